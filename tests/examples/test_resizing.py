"""The example that times resizing: every way over the same pictures, and the same bits where they are promised."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from support import shop

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("resizing_example", EXAMPLES / "resizing.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_tells_of_each_way(example, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    done = example.main([str(shop.media(tmp_path / "media", 4)), "--rounds", "2", "--n", "3", "--side", "24"])
    told = capsys.readouterr().out
    if done:
        assert told.startswith("Pillow resizes here: ")
        return
    assert [line.split()[0] for line in told.splitlines()[1:]] == ["Pillow", "native", "torch"]


def test_other_bits_are_noticed(example, tmp_path):
    (picture,) = [path for path in shop.media(tmp_path / "media", 1).iterdir() if path.suffix in {".png", ".jpg"}][:1]
    crop = example.ResizeCrop(24, 24)
    ways = {"Pillow": crop, "native": lambda image: {"pixels": 255 - crop(image)["pixels"]}, "torch": crop.fast}
    with pytest.raises(AssertionError):
        example.measured([picture], ways)
