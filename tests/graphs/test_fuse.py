"""The fused graph is the modules: every exit against the head on what that exit sees, at any batch size."""

from __future__ import annotations

import pytest
import torch
from support.parts import DIMS, LABELS, ORDER, PARTS, ROWS, batch, captured, fused
from torch import nn

from mmpipe.graphs.capture import capture
from mmpipe.graphs.fuse import ExitSpec, Probe, fuse
from mmpipe.graphs.plan import PRESENCE, GraphError, Mark

EXITS = [ExitSpec("image", ("image",)), ExitSpec("image+text", ("image", "text")), ExitSpec("h1", ORDER, depth=1)]


def separately(parts, rows, sees, depth=-1):
    """The modules one by one; what the exit does not see is zero and absent."""
    embeddings = {
        "image": parts["image"](rows["image.pixels"]),
        "text": parts["text"](rows["text.ids"], rows["text.mask"]),
        "audio": parts["audio"](rows["audio.frames"]),
    }
    presence = rows[PRESENCE] & torch.tensor([name in sees for name in ORDER])
    given = {name: value if name in sees else torch.zeros_like(value) for name, value in embeddings.items()}
    return parts["head"](presence=presence, **given)[depth], embeddings


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 32])
def test_every_exit_equals_the_modules_one_by_one(rows):
    parts = PARTS
    graph = fused(parts, EXITS)
    given = batch(rows)
    with torch.no_grad():
        output = graph(*given.values())
        for name, sees, depth in [("image", ["image"], -1), ("image+text", ["image", "text"], -1), ("h1", ORDER, 0),
                                  ("all", ORDER, -1)]:  # fmt: skip
            want, embeddings = separately(parts, given, sees, depth)
            got = output["exits"][name]
            assert got.shape == (rows, LABELS)
            assert (got - want).abs().max() <= 1e-5 * want.abs().max()
        for name, want in embeddings.items():
            assert (output["embeddings"][name] - want).abs().max() <= 1e-5 * want.abs().max()


def test_a_probe_answers_from_the_pooled_state_of_its_layer():
    parts = PARTS
    weight, bias = torch.randn(LABELS, 12), torch.randn(LABELS)
    probe = Probe("text", 1, weight, bias, mask="mask")
    graph = fused(parts, [ExitSpec("text.layer1", ("text",), probe=probe)])
    given = batch(5)
    text = parts["text"]
    with torch.no_grad():
        x = text.table(given["text.ids"]) + text.places(torch.arange(9))
        state = text.layers[0](x, src_key_padding_mask=given["text.mask"] == 0)
        mask = given["text.mask"].unsqueeze(-1).float()
        want = (state * mask).sum(1) / mask.sum(1) @ weight.T + bias
        got = graph(*given.values())["exits"]["text.layer1"]
    assert torch.allclose(got, want, atol=1e-5)


def test_every_node_says_branch_layer_and_shape():
    graph = fused(PARTS, EXITS)
    marks = [node.meta["mmpipe"] for node in graph.graph.nodes]
    assert all(isinstance(mark, Mark) for mark in marks)
    assert {mark.branch for mark in marks} == {*ORDER, "head"}
    assert {mark.layer for mark in marks if mark.branch == "image"} == {None, 1, 2, 3}


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (ExitSpec("x", ("image",), probe=Probe("image", 9, torch.zeros(5, 16), torch.zeros(5))), "has 3 layers"),
        (ExitSpec("x", ("image",), probe=Probe("image", 1, torch.zeros(5, 7), torch.zeros(5))), "wants 7 features"),
        (ExitSpec("x", ORDER, depth=4), "2 depths"),
    ],
)
def test_an_exit_that_is_not_there_is_an_error(spec, says):
    with pytest.raises(GraphError, match=says):
        fuse(*captured(PARTS), [spec, ExitSpec("all", ORDER)])


class Branching(nn.Module):
    def forward(self, frames):
        if frames.sum() > 0:
            return frames.mean(1)
        return -frames.mean(1)


class Listing(nn.Module):
    def forward(self, frames):
        return torch.stack([row.mean(0) * len(frames.tolist()) for row in frames])


@pytest.mark.parametrize(
    ("module", "operation"),
    [(Branching(), "if frames.sum() > 0:"), (Listing(), "forward fixes the batch size: it loops over the rows")],
)
def test_what_cannot_be_captured_names_module_operation_and_way_out(module, operation, capfd):
    with pytest.raises(GraphError) as caught:
        capture(module, ROWS["audio"], name="audio")
    said = str(caught.value)
    assert said.startswith(f"audio: {type(module).__name__} can't be captured")
    assert operation in said
    assert "prepare()" in said
    assert capfd.readouterr() == ("", "")


def test_an_encoder_that_only_hands_on_its_input_has_a_node_of_its_own():
    plain = capture(nn.Identity(), {"input": torch.zeros(4)}, name="image")
    graph = fuse([plain], None, [])
    assert [node.op for node in graph.graph.nodes] == ["placeholder", "placeholder", "call_function", "output"][
        -len(graph.graph.nodes) :
    ]


def test_dims_match():
    graph = fused(PARTS, [])
    embeddings = graph(*batch(2).values())["embeddings"]
    assert {name: value.shape[1] for name, value in embeddings.items()} == DIMS
