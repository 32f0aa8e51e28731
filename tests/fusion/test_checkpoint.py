"""What a head's checkpoint says of its shape is checked against what it holds, before memory is taken for it."""

from __future__ import annotations

import pytest
import torch

from mmpipe.fusion.checkpoint import TRAINED_HEADS, load_head, read_checkpoint, save_checkpoint
from mmpipe.fusion.heads import HeadError, TransformerHead

DIMS, LABELS = {"image": 6, "text": 4}, ["a", "b"]
SHAPE = {"width": 8, "heads": 2, "depth": 2, "direct": True}


def loaded(tmp_path, options):
    torch.manual_seed(0)
    path = tmp_path / "head.safetensors"
    save_checkpoint(path, TransformerHead(DIMS, LABELS, **SHAPE), kind="transformer", labels=LABELS, dims=DIMS,
                    options=options)  # fmt: skip
    return load_head("transformer", DIMS, LABELS, checkpoint=read_checkpoint(path))


def test_a_head_comes_back_as_it_was(tmp_path):
    head = loaded(tmp_path, SHAPE)
    torch.manual_seed(0)
    same = TransformerHead(DIMS, LABELS, **SHAPE)
    for name, tensor in same.state_dict().items():
        assert torch.equal(head.state_dict()[name], tensor)
    assert all(parameter.device.type == "cpu" for parameter in head.parameters())


@pytest.mark.parametrize(
    "options",
    [
        {"width": 2**20},
        {"width": 10**15},
        {"width": -8},
        {"depth": 10**9},
        {"heads": 0},
        {"heads": 3},
        {"fourier": {"image": 10**12}},
        {"fourier": {"sound": 4}},
        {"fourier": [3]},
        {"width": "wide"},
        {"wings": 2},
        {"width": 16},
        {"depth": 1},
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_an_error_before_memory_is_taken(tmp_path, monkeypatch, options):
    made = []

    def built(*arguments, **given):
        made.append(torch.get_default_device().type)
        return TransformerHead(*arguments, **given)

    monkeypatch.setitem(TRAINED_HEADS, "transformer", built)
    with pytest.raises(HeadError, match=r"head\.safetensors"):
        loaded(tmp_path, {**SHAPE, **options})
    assert set(made) <= {"meta"}
