"""The interpreter computes what Python's calls of the same operations do, bit for bit."""

import operator

import pytest
import torch
from torch import fx, nn

from mmpipe import Pipeline
from mmpipe.graphs.backends import Target, examples_of
from mmpipe.graphs.backends.eager import _Writer, joined, lower
from mmpipe.graphs.backends.interpreted import interpreted

aten = torch.ops.aten


def made(write, **tensors):
    """A module whose graph `write(graph, x, call)` fills; call(op, …) adds a node."""
    graph, root = fx.Graph(), nn.Module()
    for name, tensor in tensors.items():
        root.register_buffer(name, tensor)
    x = graph.placeholder("x")
    graph.output(write(graph, x, graph.call_function))
    return fx.GraphModule(root, graph)


def never(*tensors):
    raise AssertionError


def python(module):
    return _Writer(module).function("test")


def both(module, *inputs):
    twin = python(module)
    function = interpreted(module, never)
    assert function is not never
    with torch.inference_mode():
        found, wanted = function(*inputs), twin(*inputs)
    assert isinstance(found, tuple)
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype
        assert one.stride() == other.stride()
        assert torch.equal(one, other)
    return found


X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


def test_numbers_stand_for_tensors_and_arguments_by_name():
    def write(graph, x, call):
        y = call(aten.mul.Tensor, (x, 0.125))
        y = call(aten.sub.Tensor, (y, 3), {"alpha": 2})
        y = call(aten.div.Tensor, (y, 7))
        y = call(aten.clamp.default, (y,), {"min": None, "max": 1})
        return (call(aten.add.Tensor, (y, x), {"alpha": 0.5}),)

    both(made(write), X)
    both(made(write), X.bfloat16())


def test_several_results_and_lists_of_them():
    def write(graph, x, call):
        top = call(aten.topk.default, (x, 3))
        values, places = (call(operator.getitem, (top, number)) for number in range(2))
        parts = call(aten.split.Tensor, (x, 3, 1))
        both = call(aten.cat.default, ([call(operator.getitem, (parts, 2)), call(operator.getitem, (parts, 0))], -1))
        return values, places, both

    assert both(made(write), X)[1].dtype == torch.int64


def test_sizes_of_the_batch():
    def write(graph, x, call):
        rows = call(aten.sym_size.int, (x, 0))
        wide = call(operator.mul, (rows, 2))
        return (call(aten.expand.default, (call(aten.view.default, (x, [wide, 4])), [-1, 4])),)

    module = made(write)
    for rows in (1, 2, 6):
        both(module, X[:rows])


def test_weights_types_layouts_and_what_may_be_left_out():
    w, b = torch.randn(5, 8), torch.randn(5)

    def write(graph, x, call):
        weight, bias = graph.get_attr("w"), graph.get_attr("b")
        y = call(aten.linear.default, (x, weight, bias))
        y = call(aten.add.Tensor, (y, call(aten.linear.default, (x, graph.get_attr("w")))))
        y = call(aten.layer_norm.default, (y, [5], None, bias))
        short = call(aten.to.dtype, (y, torch.bfloat16))
        filled = call(aten.full_like.default, (short, 2.0), {"dtype": torch.float32, "device": torch.device("cpu")})
        return short, call(aten.clone.default, (filled,), {"memory_format": torch.contiguous_format}), y

    module = made(write, w=w, b=b)
    both(module, X)
    with torch.no_grad():  # they are the module's own, not copies of them
        module.w.zero_()
        both(module, X)
        function = interpreted(module, never)
        module.w.data = torch.ones(5, 8)
        assert torch.equal(function(X)[2], python(module)(X)[2])


def test_indices_that_may_be_none():
    def write(graph, x, call):
        return (call(aten.index.Tensor, (x, [None, graph.get_attr("places")])),)

    both(made(write, places=torch.tensor([3, 1])), X)


def test_what_is_not_an_operation_of_the_dispatcher_is_left_to_python():
    def method(graph, x, call):
        return (graph.call_method("relu", (x,)),)

    def own(graph, x, call):
        return (call(lambda tensor: tensor + 1, (x,)),)

    def taken_for_another(graph, x, call):  # a list of numbers where the overload wants tensors
        return (call(aten.where.self, (call(aten.gt.Scalar, (x, 0)), x, 0.0)),)

    def in_place(graph, x, call):
        return (call(aten.mul_.Tensor, (x, 0.3)),)

    def a_size_of_several(graph, x, call):
        sizes = call(aten.sym_size.default, (x,))
        return (call(aten.add.Tensor, (x, call(operator.getitem, (sizes, 0)))),)

    def implicit(graph, x, call):
        return (call(aten.expand.default, (x, [2, 6, 8]), {"implicit": True}),)

    for write in (method, own, taken_for_another, in_place, a_size_of_several, implicit):
        assert interpreted(made(write), never) is never


def test_an_error_is_the_operation_s_own_and_leaves_a_caller_s_own_scripts_optimised_as_before():
    module = made(
        lambda graph, x, call: (call(aten.embedding.default, (x, graph.get_attr("far"))),), far=torch.tensor([7])
    )
    function, before = interpreted(module, python(module)), torch._C._get_graph_executor_optimize()
    with pytest.raises(IndexError, match="index out of range"):
        function(X)
    assert torch._C._get_graph_executor_optimize() == before


def test_without_such_an_interpreter_python_calls(monkeypatch):
    monkeypatch.delattr(torch._C, "_create_function_from_graph")
    assert interpreted(made(lambda graph, x, call: (call(aten.relu.default, (x,)),)), never) is never


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 32])
def test_the_packaged_models(rows, dtype):
    with Pipeline.load("quickstart", overrides=["runtime.cache=off"]) as pipeline:
        for segment in pipeline.plan.segments:
            module = pipeline.modules[segment.name]
            inputs = examples_of(pipeline.plan, segment, rows)
            target = Target(rows, dtype)
            short = joined(module, target)
            found = both(short, *inputs)
            with torch.inference_mode():
                for one, other in zip(lower(segment, module, target, inputs)(*inputs), found, strict=True):
                    assert one.shape == other.shape  # a spectrum in bands has other last bits
