"""The example that times resizing: every way over the same pictures, and the same bits where they are promised."""

from __future__ import annotations

import pytest
import torch
from support import examples, shop


@pytest.fixture(scope="module")
def example():
    return examples.load("resizing")


def test_it_tells_of_each_way(example, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    done = example.main([str(shop.media(tmp_path / "media", 4)), "--rounds", "2", "--n", "3", "--side", "24"])
    told = capsys.readouterr().out
    if why := example.resizing.why_not():
        assert (done, told) == (1, f"Pillow resizes here: {why}\n")
        return
    assert done == 0
    assert [line.split()[0] for line in told.splitlines()[1:]] == ["Pillow", "native", "torch"]


def test_other_bits_are_noticed(example, tmp_path):
    (picture,) = [path for path in shop.media(tmp_path / "media", 1).iterdir() if path.suffix in {".png", ".jpg"}][:1]
    crop = example.ResizeCrop(24, 24)
    ways = {"Pillow": crop, "native": lambda image: {"pixels": 255 - crop(image)["pixels"]}, "torch": crop.fast}
    with pytest.raises(AssertionError):
        example.measured([picture], ways)
