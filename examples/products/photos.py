"""Fashion-MNIST as product photos: read the idx files, save one article as a picture.

Source of the data: Han Xiao, Kashif Rasul, Roland Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking
Machine Learning Algorithms" (2017), MIT licence; Debian packages it as `dataset-fashion-mnist`.
"""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

LABELS = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
SIDE = 28  # pixels, as published
UPSCALE = 4
SAVED_SIDE = SIDE * UPSCALE  # 112 pixels
JPEG_QUALITY = 90

Photos = tuple[NDArray[np.uint8], NDArray[np.uint8]]


class PhotosMissing(FileNotFoundError):
    """The idx files are not there, or are not idx files. The message says where they were looked for and what to do."""


def read_idx(path: Path) -> NDArray[np.uint8]:
    """An idx .gz file of unsigned bytes → array of the shape its header gives."""
    try:
        raw = gzip.decompress(path.read_bytes())
    except FileNotFoundError:
        raise PhotosMissing(
            f"no {path.name} in {path.parent}: install Debian's package dataset-fashion-mnist (apt install "
            "dataset-fashion-mnist), or name a folder that holds the four Fashion-MNIST .gz files with --photos DIR"
        ) from None
    except (OSError, EOFError) as error:
        raise PhotosMissing(f"{path} is not a whole gzip file ({error}): fetch it again") from error
    dimensions = raw[3] if len(raw) > 4 and raw[:3] == b"\0\0\x08" else 0
    shape = tuple(int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions))
    data = np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions) if dimensions else np.empty(0, np.uint8)
    if not dimensions or data.size != int(np.prod(shape)):
        raise PhotosMissing(f"{path} is not a whole idx file of unsigned bytes: fetch it again")
    return data.reshape(shape)


def load_photos(part: str, folder: Path = DEBIAN_FOLDER) -> Photos:
    """`part` is "train" or "t10k" → (pictures [n, 28, 28], 0 background to 255; classes [n], indices of LABELS)."""
    pictures = read_idx(folder / f"{part}-images-idx3-ubyte.gz")
    classes = read_idx(folder / f"{part}-labels-idx1-ubyte.gz")
    return pictures, classes


def to_picture(picture: NDArray[np.uint8]) -> Image.Image:
    """[28, 28] → a 112×112 grey picture, the article dark on white as a shop would show it."""
    return Image.fromarray(255 - picture).resize((SAVED_SIDE, SAVED_SIDE), Image.Resampling.BICUBIC)


def encode(picture: NDArray[np.uint8], suffix: str) -> bytes:
    """[28, 28] → the bytes of a .jpg or .png file."""
    buffer = io.BytesIO()
    if suffix == ".jpg":
        to_picture(picture).save(buffer, "JPEG", quality=JPEG_QUALITY)
    else:
        to_picture(picture).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
