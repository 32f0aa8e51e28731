"""An encoder or head of one's own that breaks its word is refused when it is loaded, with its key and what it does."""

import itertools
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from mmpipe import Pipeline
from mmpipe.encoders import EncoderError
from mmpipe.errors import ConfigError
from mmpipe.vetting import vet_encoder_rows

PARTS = """
    import torch
    from torch import nn


    class Letters(nn.Module):
        def forward(self, x):
            {module}


    class Encoder:
        modality, dim = "text", 4

        def __init__(self):
            self.module = Letters()

        def prepare(self, media):
            return {{"x": torch.tensor([float(len(media)), 1.0, media.count("e"), 0.0])}}


    class Head(nn.Module):
        def __init__(self, dims, labels):
            super().__init__()

        def forward(self, embeddings, presence_BM):
            x = embeddings["text"]
            {head}
"""
_NUMBERS = itertools.count()


def load(folder: Path, *, module: str = "return x", head: str = "return x[:, :3]", task: str = "classify") -> Pipeline:
    name = f"vetted_{next(_NUMBERS)}"  # another module each time: Python keeps those it has imported
    (folder / f"{name}.py").write_text(textwrap.dedent(PARTS).format(module=module, head=head), encoding="utf-8")
    classify = f"labels: [a, b, c]\nfusion: {{head: '{name}:Head'}}\n" if task == "classify" else ""
    config = folder / f"{name}.yaml"
    config.write_text(f"task: {task}\nencoders: {{text: {{model: '{name}:Encoder'}}}}\n{classify}", encoding="utf-8")
    return Pipeline.load(config)


@pytest.mark.parametrize(
    ("head", "told"),
    [
        ("return x[:, :1]", r"float32 \[batch, 1\]; for 3 labels it must return float logits \[batch, 3\]"),
        ("return x", r"float32 \[batch, 4\]"),
        ("return x[:, 0]", r"float32 \[batch\]"),
        ("return x[:, None, :3]", r"float32 \[batch, 1, 3\]"),
        ("return x[:, :3].T", r"float32 \[3, batch\]"),
        ("return x[:, :3].argsort()", r"int64 \[batch, 3\]"),
        ("x = x[:, :3]; return x - x.mean(0)", "mixes the rows of a batch"),
        ("return nn.functional.dropout(x[:, :3], 0.5, True)", "other results each time"),
    ],
)
def test_a_head_that_breaks_its_word_is_refused(tmp_path: Path, head: str, told: str) -> None:
    with pytest.raises(ConfigError, match=rf"fusion\.head: .*{told}"):
        load(tmp_path, head=head)


@pytest.mark.parametrize("task", ["classify", "embed"])
@pytest.mark.parametrize(
    ("module", "told"),
    [
        ("return x[:, :3]", r"float32 \[batch, 3\]; with dim = 4 it must return float \[batch, 4\]"),
        ("return x.long()", r"int64 \[batch, 4\]"),
        ("return x[:, None]", r"float32 \[batch, 1, 4\]"),
        ("return x, x", "2 tensors"),
        ("return x - x.mean(0)", "mixes the rows of a batch"),
        ("return x.cumsum(0).flip(0)", "mixes the rows of a batch"),
        ("return nn.functional.dropout(x, 0.5, True)", "other results each time"),
    ],
)
def test_an_encoder_that_breaks_its_word_is_refused(tmp_path: Path, task: str, module: str, told: str) -> None:
    with pytest.raises(ConfigError, match=rf"encoders\.text\.model: .*{told}"):
        load(tmp_path, module=module, task=task)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.int64, torch.bool])
def test_a_mixture_of_rows_is_seen_in_numbers_of_any_kind(dtype: torch.dtype) -> None:
    class Mixing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.float() - x.float().mean(0)

    alike = torch.full((4,), 1).to(dtype) if dtype in (torch.uint8, torch.float32) else torch.arange(4).to(dtype)
    with pytest.raises(EncoderError, match="mixes the rows"):
        vet_encoder_rows(Mixing(), {"x": alike})
    vet_encoder_rows(nn.Identity(), {"input": alike})


def test_those_that_keep_theirs_are_used(tmp_path: Path) -> None:
    with load(tmp_path, module="return x.softmax(1)", head="return torch.log(x[:, :3] + 1e-3)") as pipeline:
        assert pipeline(text="abcdef").label == "a"
