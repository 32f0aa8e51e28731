"""A graph as plain data, through JSON, and a captured graph apart from its weights."""

from __future__ import annotations

import json
import math
import operator

import pytest
import torch
from support import parts
from torch import fx, nn

from mmpipe.graphs import plain, recapture
from mmpipe.graphs.capture import capture
from mmpipe.graphs.digest import digest
from mmpipe.graphs.fuse import ExitSpec, outputs_of
from mmpipe.graphs.plan import Mark


class Odd(nn.Module):
    """Arguments of every kind, a constant that capture lifts, a buffer that no checkpoint holds."""

    def __init__(self, seed):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("shift", torch.randn(4, generator=torch.Generator().manual_seed(seed)), persistent=False)

    def forward(self, x):
        lifted = torch.tensor([1.0, 2.0, 3.0, 4.0])
        masked = torch.where(x[:, 1:3:2] > 0, -math.inf, 0.5)
        y = self.linear(x).to(torch.float64).add(self.shift, alpha=2).to(dtype=torch.float32)
        return torch.cat([y * lifted, torch.zeros(x.shape[0], 2, device="cpu"), masked.clamp(min=-9.0)], dim=-1)


def through_json(graph):
    return plain.read(json.loads(json.dumps(plain.written(graph))))


def test_a_graph_through_json_is_the_same_graph():
    captured = capture(Odd(0), {"x": torch.ones(4)}, name="odd")
    again = fx.GraphModule(captured.graph, through_json(captured.graph.graph))
    assert digest(again) == digest(captured.graph)
    one, other = captured.graph.graph.nodes, again.graph.nodes
    assert [node.name for node in one] == [node.name for node in other]
    assert [node.meta["mmpipe"] for node in one] == [node.meta["mmpipe"] for node in other]
    assert all(isinstance(node.meta["mmpipe"], Mark) for node in other)
    given = torch.randn(5, 4)
    assert torch.equal(again(given)[0], captured.graph(given)[0])


def test_a_fused_graph_with_its_output_by_name_too():
    graph = parts.fused(parts.PARTS, [ExitSpec("image", ("image",))])
    assert digest(fx.GraphModule(graph, through_json(graph.graph))) == digest(graph)
    assert outputs_of(through_json(graph.graph)).keys() == outputs_of(graph.graph).keys()


def test_functions_that_a_user_puts_in_are_found_again():
    graph = fx.Graph()
    value = graph.placeholder("x")
    for function in (torch.relu, operator.neg, nn.functional.gelu, math.prod):
        value = graph.call_function(function, (value,))
    graph.output(value)
    assert [node.target for node in through_json(graph).nodes] == [node.target for node in graph.nodes]


@pytest.mark.parametrize("odd", [lambda x: x, torch.nn.functional.gelu.__call__])
def test_a_function_without_a_name_is_refused(odd):
    graph = fx.Graph()
    graph.output(graph.call_function(odd, (graph.placeholder("x"),)))
    with pytest.raises(plain.Unwritable, match="can't be imported"):
        plain.written(graph)


def test_an_argument_that_plain_data_cannot_say_is_refused():
    graph = fx.Graph()
    graph.output(graph.call_function(torch.relu, (1j,)))
    with pytest.raises(plain.Unwritable, match="an argument is a complex"):
        plain.written(graph)


def test_a_capture_apart_from_its_weights_takes_those_of_another_module():
    one, other = Odd(1).eval(), Odd(2).eval()
    content = recapture.forget_weights(capture(one, {"x": torch.ones(4)}, name="odd"), one)
    given = torch.randn(3, 4)
    with torch.no_grad():
        for module in (one, other):
            again = recapture.with_weights(content, module)
            assert (again.name, again.inputs, again.outputs, again.layers) == ("odd", ("x",), 1, 0)
            assert torch.equal(again.graph(given)[0], module(given))
    assert len(content) < 20_000


def test_the_weights_are_the_module_s_own_not_copies():
    module = Odd(1).eval()
    content = recapture.forget_weights(capture(module, {"x": torch.ones(4)}, name="odd"), module)
    again = recapture.with_weights(content, module)
    places = {tensor.data_ptr() for tensor in [*again.graph.parameters(), *again.graph.buffers()]}
    assert {tensor.data_ptr() for tensor in [*module.parameters(), *module.buffers()]} <= places
