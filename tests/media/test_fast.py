"""Pictures decoded smaller than they are: no smaller than was asked for, close to the exact ones, as strict as they."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmpipe.errors import MediaError
from mmpipe.media import Limits, View, estimate_bytes, load

WIDTH, HEIGHT = 1003, 757


def photo() -> Image.Image:
    """Soft shapes with a little grain: four corners of different colours."""
    noise = np.random.default_rng(3)
    corners = Image.fromarray(noise.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    soft = np.asarray(corners.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.int16)
    grainy = soft + noise.integers(-6, 7, soft.shape)
    return Image.fromarray(np.clip(grainy, 0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


KINDS: dict[str, bytes] = {
    "4:2:0": encoded(photo(), subsampling="4:2:0"),
    "4:2:2": encoded(photo(), subsampling="4:2:2"),
    "4:4:4": encoded(photo(), subsampling="4:4:4"),
    "progressive": encoded(photo(), progressive=True),
    "grey": encoded(photo().convert("L")),
    "CMYK": encoded(photo().convert("CMYK")),
    "several": encoded(photo(), "MPO", save_all=True, append_images=[photo()]),
}


def levels(image: Image.Image) -> np.ndarray[Any, Any]:
    return np.asarray(image, np.float64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("smallest_side", "parts"), [(758, 1), (757, 1), (379, 1), (378, 2), (189, 4), (95, 4), (94, 8), (1, 8)]
)
def test_the_shorter_side_stays_long_enough(kind: str, smallest_side: int, parts: int) -> None:
    exact = load("image", KINDS[kind])
    small = load("image", KINDS[kind], smallest_side=smallest_side)
    assert small.mode == "RGB"
    assert small.size == (-(-WIDTH // parts), -(-HEIGHT // parts))
    if parts == 1:
        assert np.array_equal(levels(small), levels(exact))
    else:  # each pixel is about the mean of those that it stands for
        assert np.abs(levels(small) - levels(exact.reduce(parts))).mean() < 2.5


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF", "WEBP"])
def test_other_formats_are_decoded_whole(kind: str) -> None:
    data = encoded(photo(), kind)
    assert np.array_equal(levels(load("image", data, smallest_side=8)), levels(load("image", data)))
    assert load("image", photo(), smallest_side=8).size == (WIDTH, HEIGHT)


def test_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(photo(), exif=exif)
    exact, small = load("image", data), load("image", data, smallest_side=100)
    assert exact.size == (HEIGHT, WIDTH)
    assert small.size == (-(-HEIGHT // 4), -(-WIDTH // 4))
    near = exact.resize(small.size, Image.Resampling.BOX)
    assert np.abs(levels(small) - levels(near)).mean() < 3


@pytest.mark.parametrize("box", [(0.0, 0.0, 0.5, 1.0), (0.25, 0.5, 0.75, 0.75), (0.0, 0.0, 1.0, 1.0)])
def test_a_part_keeps_as_many_pixels_as_a_whole(box: tuple[float, float, float, float]) -> None:
    view = View(KINDS["4:2:0"], box=box)
    exact, small = load("image", view), load("image", view, smallest_side=90)
    assert 90 <= min(small.size) < 4 * 90
    assert min(small.size) < min(exact.size)
    near = exact.resize(small.size, Image.Resampling.BOX)
    assert np.abs(levels(small) - levels(near)).mean() < 3


@pytest.mark.parametrize("smallest_side", [None, 90])
def test_it_is_as_strict(smallest_side: int | None) -> None:
    for kind in ("4:2:0", "progressive"):
        with pytest.raises(MediaError) as info:
            load("image", KINDS[kind][: len(KINDS[kind]) // 2], smallest_side=smallest_side)
        assert info.value.code == "truncated"
    with pytest.raises(MediaError) as info:  # the limit is on the picture, not on what would be made of it
        load("image", KINDS["4:2:0"], limits=Limits(image_megapixels=0.5), smallest_side=smallest_side)
    assert info.value.code == "too_large"


def test_estimates_follow() -> None:
    plain, progressive = KINDS["4:2:0"], KINDS["progressive"]
    small = -(-WIDTH // 8) * -(-HEIGHT // 8)
    assert 4 * small <= estimate_bytes("image", plain, smallest_side=90) <= estimate_bytes("image", plain) / 8
    # all coefficients are kept until the last scan
    assert estimate_bytes("image", progressive, smallest_side=90) >= 3 * WIDTH * HEIGHT
    assert estimate_bytes("image", progressive, smallest_side=90) < estimate_bytes("image", progressive)
    whole = View(plain, box=(0.0, 0.0, 0.1, 0.1))
    assert estimate_bytes("image", whole, smallest_side=90) == estimate_bytes("image", plain)
