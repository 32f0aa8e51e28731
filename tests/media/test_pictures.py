"""Pictures of every kind come out as encoders expect them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.made import NOISE, encoded, picture, png_header

from mmpipe.errors import MediaError
from mmpipe.media import Limits, load


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *((kind, mode) for kind in ("PNG", "BMP", "TIFF", "GIF", "WEBP") for mode in ("1", "L", "P", "RGB")),
        ("JPEG", "L"),
        ("JPEG", "RGB"),
    ],
)
def test_every_kind_becomes_rgb(tmp_path: Path, kind: str, mode: str) -> None:
    original = picture(mode=mode)
    path = tmp_path / f"x.{kind.lower()}"
    path.write_bytes(encoded(original, kind, **({"lossless": True} if kind == "WEBP" else {})))
    for source in (path, str(path), path.read_bytes()):
        result = load("image", source)
        assert (result.mode, result.size) == ("RGB", original.size)
    if kind not in ("GIF", "JPEG"):
        assert np.array_equal(np.asarray(result), np.asarray(original.convert("RGB")))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP"])
def test_a_grey_file_may_stay_grey(kind: str) -> None:
    data = encoded(picture(mode="L"), kind)
    grey, colour = load("image", data, grey=True), load("image", data)
    assert (grey.mode, colour.mode) == ("L", "RGB")
    assert np.array_equal(np.asarray(colour.convert("L")), np.asarray(grey))
    assert load("image", encoded(picture(mode="RGB"), kind), grey=True).mode == "RGB"


def test_grey_that_is_deep_or_clear_becomes_rgb_all_the_same() -> None:
    deep = Image.fromarray(np.full((2, 2), 0x8000, np.uint16))
    half = Image.merge("LA", [Image.new("L", (2, 2), 0), Image.new("L", (2, 2), 128)])
    for source in (encoded(deep, "PNG"), encoded(half, "PNG"), encoded(Image.new("L", (2, 2)), "PNG", transparency=0)):
        assert load("image", source, grey=True).mode == "RGB"
        assert load("image", source, grey=True).tobytes() == load("image", source).tobytes()


def test_upright() -> None:
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[0, 0] = 255  # a white corner, top left as stored
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: the corner goes to the top right
    data = encoded(Image.fromarray(pixels), "PNG", exif=exif)
    result = load("image", data)
    assert result.size == (4, 6)
    assert result.getpixel((3, 0)) == (255, 255, 255)
    assert result.getexif().get(0x0112) is None  # nobody turns it twice
    opened = Image.open(io.BytesIO(data))
    assert load("image", opened).size == (4, 6)
    assert opened.size == (6, 4)  # the caller's own is as it was


def test_alpha_on_white() -> None:
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 0] = (255, 0, 0, 255)
    pixels[0, 1] = (255, 0, 0, 0)
    pixels[1, 0] = (0, 0, 0, 128)
    clear = Image.fromarray(pixels)
    for source in (encoded(clear, "PNG"), clear, pixels, torch.from_numpy(pixels).permute(2, 0, 1)):
        result = load("image", source)
        assert [result.getpixel(at) for at in ((0, 0), (1, 0), (0, 1))] == [(255, 0, 0), (255,) * 3, (127,) * 3]
    palette = picture(mode="P")
    for other in (encoded(palette, "PNG", transparency=palette.getpixel((0, 0))), encoded(clear.convert("LA"), "PNG")):
        load("image", other)
    keyed = Image.new("RGB", (2, 2), (9, 8, 7))
    assert load("image", encoded(keyed, "PNG", transparency=(9, 8, 7))).getpixel((0, 0)) == (255, 255, 255)


def test_deep_pixels() -> None:
    ramp = np.array([[0, 256, 32768, 65535]], np.uint16)
    expected = [[0, 1, 128, 255]]
    for kind in ("PNG", "TIFF"):
        assert np.asarray(load("image", encoded(Image.fromarray(ramp), kind)))[:, :, 0].tolist() == expected
    as_float = Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32))
    assert np.asarray(load("image", encoded(as_float, "TIFF")))[0, :, 1].tolist() == [0, 128, 255]
    with pytest.raises(MediaError, match="not_finite"):
        load("image", encoded(Image.fromarray(np.array([[np.nan, 1.0]], np.float32)), "TIFF"))


def test_cmyk_and_first_frames() -> None:
    assert load("image", encoded(Image.new("CMYK", (3, 3), (0, 255, 255, 0)), "TIFF")).getpixel((0, 0)) == (255, 0, 0)
    red, blue = Image.new("RGB", (5, 5), "red"), Image.new("RGB", (5, 5), "blue")
    for kind in ("GIF", "PNG", "TIFF"):
        data = encoded(red, kind, save_all=True, append_images=[blue])
        assert load("image", data).getpixel((2, 2)) == (255, 0, 0)


def test_arrays_and_tensors() -> None:
    pixels = NOISE.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    for source in (
        pixels,
        pixels.transpose(2, 0, 1),
        torch.from_numpy(pixels),
        torch.from_numpy(pixels).permute(2, 0, 1),
        torch.from_numpy(pixels.astype(np.int64)),
        pixels.astype(np.float64) / 255,
        torch.from_numpy(pixels).permute(2, 0, 1).float().requires_grad_() / 255,
        (torch.from_numpy(pixels).float() / 255).bfloat16(),
    ):
        result = np.asarray(load("image", source)).astype(int)
        assert np.abs(result - pixels).max() <= (1 if getattr(source, "dtype", None) == torch.bfloat16 else 0)
    for grey in (pixels[:, :, 0], pixels[:, :, :1], torch.from_numpy(pixels[:, :, :1]).permute(2, 0, 1)):
        assert np.array_equal(np.asarray(load("image", grey)), np.repeat(pixels[:, :, :1], 3, axis=2))


@pytest.mark.parametrize(
    ("source", "code"),
    [
        (np.zeros((2, 3, 4, 3), np.uint8), "unsupported"),
        (np.zeros((9, 9, 7), np.uint8), "unsupported"),
        (np.zeros((0, 9, 3), np.uint8), "empty"),
        (np.full((4, 4, 3), 200.0), "unsupported"),
        (np.full((4, 4, 3), -1), "unsupported"),
        (np.full((4, 4, 3), np.nan), "not_finite"),
        (np.full((4, 4), "x"), "unsupported"),
        (torch.zeros(3, 4, 4, device="meta"), "unsupported"),
        (np.broadcast_to(np.uint8(0), (20_000, 20_000, 3)), "too_large"),
        ([[1, 2], [3, 4]], "unsupported"),
        (None, "unsupported"),
    ],
)
def test_no_picture(source: Any, code: str) -> None:
    with pytest.raises(MediaError) as info:
        load("image", source)
    assert info.value.code == code


def test_a_higher_limit_is_a_higher_limit() -> None:
    with pytest.raises(MediaError) as info:
        load("image", png_header(15_000, 14_000), limits=Limits(image_megapixels=250))
    assert info.value.code in ("truncated", "corrupt")  # it was let through to the decoder
