"""The eager backend's function against torch.fx's own code."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import fx, nn

from mmpipe.graphs.backends import Target, lower
from mmpipe.graphs.plan import Segment


def segment(name="image@0"):
    return Segment(name, 0, "image", (), (), (), 1)


class Everything(nn.Module):
    """All that an argument can be: nested lists, keywords, slices, infinities, types, constants, methods."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.register_buffer("mask", torch.tensor([0.0, float("-inf"), 0.0, 0.0]))

    def forward(self, x, v4, bound_0):
        y = torch.nn.functional.linear(x, self.inner.weight, bias=self.inner.bias)
        y = torch.cat([y, v4.to(torch.float32), torch.full((x.shape[0], 1), float("inf"))], dim=1)
        y = torch.where(y > 1e9, torch.tensor(-0.0), y)[:, 0:8:2]
        y = torch.add(y, self.mask, alpha=2).reshape((-1, 4)) + bound_0
        return y, y.softmax(-1)


def test_it_computes_what_the_graph_does():
    torch.manual_seed(0)
    module = fx.symbolic_trace(Everything())
    arguments = torch.randn(3, 4), torch.randint(0, 5, (3, 4)), torch.randn(3, 4)
    with torch.inference_mode():
        want, got = module(*arguments), lower("eager", segment(), module, Target(1))(*arguments)
    assert isinstance(got, tuple)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


def test_a_changed_weight_is_seen():
    module = fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2)))
    run = lower("eager", segment(), module, Target(1))
    before = run(torch.ones(1, 2))
    with torch.no_grad():
        module.get_parameter("0.weight").mul_(2.0)
    assert not torch.equal(before, run(torch.ones(1, 2)))


@pytest.mark.parametrize("used", [True, False])
def test_a_value_is_freed_after_its_last_use(used):
    alive = []

    def watched(x):
        y = x + 1
        alive.append(weakref.ref(y))
        return y

    def count(x):
        gc.collect()
        return x + sum(ref() is not None for ref in alive)

    graph = fx.Graph()
    x = graph.placeholder("x")
    first = graph.call_function(watched, (x,))
    second = graph.call_function(torch.neg, (first if used else x,))
    graph.output((graph.call_function(count, (second,)),))
    (result,) = lower("eager", segment(), fx.GraphModule(nn.Module(), graph), Target(1))(torch.zeros(1))
    assert result.item() == (-1.0 if used else 0.0)


def test_a_module_that_a_user_put_in_is_called():
    graph = fx.Graph()
    graph.output((graph.call_module("own", (graph.placeholder("x"),)),))
    root = nn.Module()
    root.own = nn.ReLU()
    (result,) = lower("eager", segment(), fx.GraphModule(root, graph), Target(1))(torch.tensor([-1.0, 2.0]))
    assert result.tolist() == [0.0, 2.0]
