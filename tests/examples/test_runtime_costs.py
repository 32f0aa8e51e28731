"""The benchmark runs and prints every line that the README quotes; its figures are nobody's test."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_benchmark_prints_each_figure(tmp_path):
    few = ["--rows", "1", "4", "--pairs", "2", "--buckets", "1", "--batches", "20", "--samples", "6"]
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "runtime_costs.py"), "quickstart", *few],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for part in ("proofs: ", "the lower bound", "orchestration: ", "a segment", "auto ÷", "observers", "resident: "):
        assert part in done.stdout, part


def test_the_full_size_configuration_is_one(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import full_size

    from mmpipe.config import load

    for name in ("clip", "minilm", "clap"):
        (tmp_path / name).mkdir()
    path = tmp_path / "clip_clap.yaml"
    path.write_text(full_size.configuration(tmp_path), encoding="utf-8")
    assert list(load(path).encoders) == ["image", "text", "audio"]
    assert yaml.safe_load(path.read_text())["labels"] == full_size.LABELS


def test_the_full_size_tokenizer_reads_any_text(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import full_size

    full_size.letters(tmp_path, limit=77)
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path)("a dog, 狗")["input_ids"]
    assert ids[0] == 0
    assert ids[-1] == 2
    assert 3 not in ids
