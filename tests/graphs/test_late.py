"""Graph modules whose Python is written when somebody wants it: to whoever looks they are as torch.fx's own."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import fx, nn

from mmpipe.graphs.late import LateModule


@pytest.fixture
def module():
    torch.manual_seed(0)
    traced = fx.symbolic_trace(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
    return LateModule(traced, traced.graph)


@pytest.fixture
def written(monkeypatch):
    """The modules whose Python has been written."""
    found = []
    write = fx.GraphModule.recompile
    monkeypatch.setattr(fx.GraphModule, "recompile", lambda self: found.append(self) or write(self))
    return found


X = torch.tensor([[1.0, -2.0, 3.0]])


def test_it_is_written_once_when_it_is_called(written, module):
    late = LateModule(module, copy.deepcopy(module.graph))
    assert late not in written
    found = late(X)
    assert written.count(late) == 1
    assert torch.equal(late(X), found)
    assert written.count(late) == 1
    assert torch.equal(found, fx.GraphModule(module, module.graph)(X))


def test_an_edit_is_seen_after_recompile(module):
    before = module(X)
    (relu,) = (node for node in module.graph.nodes if node.target == "1")
    with module.graph.inserting_after(relu):
        twice = module.graph.call_function(torch.mul, (relu, 2))
    relu.replace_all_uses_with(twice, delete_user_cb=lambda user: user is not twice)
    module.recompile()
    assert torch.equal(module(X), 2 * before)


def test_its_code_copies_and_pickles_are_those_of_torch_fx(module):
    plain = fx.GraphModule(module, copy.deepcopy(module.graph))
    assert module.code == plain.code
    assert str(copy.deepcopy(module)).splitlines()[1:] == str(plain).splitlines()[1:]
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(X), plain(X))
    assert module.graph.owning_module is module


def test_a_compiler_takes_it_once_it_is_written(module):
    module.write()
    assert torch.equal(torch.compile(module, backend="eager")(X), module(X))
