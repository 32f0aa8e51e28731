"""Pictures → PIL.Image in RGB. Pillow is imported when the first one is needed."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, BinaryIO

from mmpipe.errors import MediaError
from mmpipe.media.limits import Limits

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

# No others: some of Pillow's formats start other programs (EPS) or are hardly ever meant.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "AVIF")

_ORIENTATION = 0x0112  # EXIF
_LARGE_BYTES = 8_000_000  # of a file whose pixels may be few: what else it holds is read to open it
_OPENED_COPIES = 3
_EACH = {"WEBP": 18, "AVIF": 12, "TIFF": 8}  # peak bytes a pixel of what the decoder keeps in its own memory as well
_FLOAT_SLACK = 0.01  # resampling and rounding leave 0..1 by this much


def from_file(
    file: BinaryIO,
    size_bytes: int,
    limits: Limits,
    smallest_side: int | None = None,
    reserve: Callable[[int], None] = lambda count: None,
    grey: bool = False,
) -> Image.Image:
    """The first frame of a file that is within its size limit, in RGB. Raises MediaError.

    smallest_side: a JPEG may come out at a half, a quarter or an eighth, its shorter side no less than these pixels.
    reserve: called with the bytes that it takes at its peak, before it is decoded; with those that a large file takes
    to be opened before that.
    grey: one that is grey, in 8 bits and without alpha, stays in L.
    """
    _reserve_opening(size_bytes, reserve)
    picture = _header(file, limits)
    reserve(_peak_bytes(picture, smallest_side))
    return _rgb(_loaded(picture), grey)


def from_memory(source: Any, limits: Limits) -> Image.Image:
    """A PIL image, array or tensor as RGB; what was given is not changed. Raises MediaError."""
    from PIL import Image

    if isinstance(source, Image.Image):
        _check_size(source.size, limits)
        return _rgb(_loaded(source).copy())
    return _rgb(_from_array(source, limits))


def file_size(file: BinaryIO, limits: Limits) -> tuple[int, int]:
    """Width and height, upright, from the header. Raises MediaError."""
    picture = _header(file, limits)
    width, height = picture.size
    lies = picture.getexif().get(_ORIENTATION, 1) >= 5  # turned by a quarter
    return (height, width) if lies else (width, height)


def memory_size(source: Any) -> tuple[int, int] | None:
    """Width and height of what PIL holds; an array's shape has no fixed order of sides."""
    size = getattr(source, "size", None)
    return (int(size[0]), int(size[1])) if isinstance(size, tuple) else None


def estimate_file_bytes(
    file: BinaryIO,
    size_bytes: int,
    limits: Limits,
    smallest_side: int | None = None,
    reserve: Callable[[int], None] = lambda count: None,
) -> int:
    """Peak bytes of `from_file`, from the header; `reserve` as there, with what a large file takes to be opened."""
    _reserve_opening(size_bytes, reserve)
    return _peak_bytes(_header(file, limits), smallest_side)


def _reserve_opening(size_bytes: int, reserve: Callable[[int], None]) -> None:
    if size_bytes > _LARGE_BYTES:
        reserve(_OPENED_COPIES * size_bytes)


def _peak_bytes(picture: Image.Image, smallest_side: int | None) -> int:
    """What a picture will take that is about to be decoded, no smaller than asked for; it is told so here."""
    width, height = picture.size
    scaled = _scaled(picture, smallest_side)
    progressive = bool(picture.info.get("progressive"))
    # Pillow holds RGB in 4 bytes a pixel; other modes, progressive JPEGs and turned pictures need more copies.
    plain = picture.mode == "RGB" and not progressive and "transparency" not in picture.info
    each = max(_EACH.get(picture.format or "", 0), 16 if not plain else 8 if "exif" in picture.info else 4)
    if picture.mode in ("F", "I"):  # as float64, to find out what is white
        each = 32
    if not scaled:
        return width * height * each
    # whatever the scale, a progressive JPEG is in memory as coefficients, 2 bytes each, until its last scan
    return picture.width * picture.height * each + (6 * width * height if progressive else 0)


def estimate_memory_bytes(source: Any) -> int:
    """Peak bytes of `from_memory`: of what is added to what is there."""
    size = getattr(source, "size", None)
    if isinstance(size, tuple):  # PIL: (width, height)
        return int(16 * size[0] * size[1])
    shape = tuple(getattr(source, "shape", ()))
    pixels = 1
    for length in shape:
        pixels *= int(length)
    return 16 * pixels


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow knows."""
    from PIL import Image

    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _header(file: BinaryIO, limits: Limits) -> Image.Image:
    """The picture, opened and within its limit, its pixels not yet read."""
    from PIL import Image, UnidentifiedImageError

    limit_pixels = limits.image_megapixels * 1e6
    # Pillow warns, and then refuses, above a bound of its own: no lower than the one that was asked for.
    if Image.MAX_IMAGE_PIXELS is not None and limit_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = int(limit_pixels)
    head = file.read(16)
    file.seek(0)
    try:
        picture = Image.open(file, formats=_formats())
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise MediaError("image", "too_large", f"over the limit of {limits.image_megapixels:g} megapixels") from error
    except UnidentifiedImageError as error:
        known = _format_of(head)
        if known == "AVIF":
            raise MediaError(
                "image", "unsupported", "AVIF, which this Pillow can't read: pip install -U pillow"
            ) from error
        if known:
            raise MediaError("image", "corrupt", f"begins like a {known} file, but its header can't be read") from error
        raise MediaError("image", "unsupported", f"not a picture of a known kind ({', '.join(FORMATS)})") from error
    except Exception as error:
        raise _decoder_error(error) from error
    _check_size(picture.size, limits)
    return picture


def _scaled(picture: Image.Image, smallest_side: int | None) -> bool:
    """Whether it will be decoded at a half, a quarter or an eighth: the least that keeps its shorter side that long.

    A JPEG's decoder then computes fewer pixels from the same coefficients. Other formats know no such thing.
    """
    whole = picture.size
    if smallest_side is not None:
        picture.draft(picture.mode, (smallest_side, smallest_side))
    return picture.size != whole


def _loaded(picture: Image.Image) -> Image.Image:
    try:
        picture.load()
    except Exception as error:
        raise _decoder_error(error) from error
    return picture


def _decoder_error(error: Exception) -> MediaError:
    """What Pillow's many exceptions mean."""
    if isinstance(error, MemoryError):
        return MediaError("image", "too_large", "not enough memory to decode it")
    if isinstance(error, OSError) and error.errno:
        return MediaError("image", "unreadable", error.strerror or "can't be read")
    said = str(error).lower()
    if isinstance(error, EOFError) or any(
        word in said for word in ("truncated", "unexpected end", "eof", "not enough", "buffer is not large")
    ):
        return MediaError("image", "truncated", "the file ends before the picture does")
    if isinstance(error, NotImplementedError) or "not supported" in said or "unsupported" in said:
        return MediaError("image", "unsupported", "a kind of picture that Pillow can't decode")
    return MediaError("image", "corrupt", "the file is damaged")


def _format_of(head: bytes) -> str | None:
    """The format that the first bytes promise, for those that Pillow then refused."""
    signs = {
        b"\xff\xd8\xff": "JPEG",
        b"\x89PNG": "PNG",
        b"GIF8": "GIF",
        b"BM": "BMP",
        b"II*\0": "TIFF",
        b"MM\0*": "TIFF",
    }
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis"):
        return "AVIF"
    return next((name for sign, name in signs.items() if head.startswith(sign)), None)


def _check_size(size: tuple[int, int], limits: Limits) -> None:
    width, height = size
    if width * height == 0:
        raise MediaError("image", "empty", "no pixels")
    if width * height > limits.image_megapixels * 1e6:
        text = f"{width} x {height} pixels, over the limit of {limits.image_megapixels:g} megapixels"
        raise MediaError("image", "too_large", text)


def _rgb(picture: Image.Image, grey: bool = False) -> Image.Image:
    """Upright and in RGB (`grey`: or as it is, in L): deep pixels cut to 8 bits, alpha laid on white. May change
    `picture`."""
    from PIL import Image, ImageOps

    with contextlib.suppress(Exception):  # a damaged EXIF block says nothing about the pixels
        ImageOps.exif_transpose(picture, in_place=True)
    mode = picture.mode
    try:
        if mode.startswith("I") or mode == "F":
            return Image.fromarray(_eight_bits(picture)).convert("RGB")
        if mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in picture.info:
            seen = picture if mode == "RGBA" else picture.convert("RGBA")
            on_white = Image.new("RGB", seen.size, "white")
            on_white.paste(seen, mask=seen.getchannel("A"))
            return on_white
        return picture if mode == "RGB" or (grey and mode == "L") else picture.convert("RGB")
    except MediaError:
        raise
    except ValueError as error:
        raise MediaError("image", "unsupported", f"pixels of the kind {mode} can't be turned into RGB") from error
    except Exception as error:
        raise _decoder_error(error) from error


def _eight_bits(picture: Image.Image) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Deep grey pixels → 0..255. 16-bit modes lose their low byte, as 16-bit colour does in Pillow.

    32-bit and float files don't say what white is: 1, 255, 65535 or 2^31 - 1, the first that no pixel is above.
    """
    import numpy as np

    pixels = np.asarray(picture)
    if picture.mode.startswith("I;16"):
        return (pixels.astype(np.uint16) >> 8).astype(np.uint8)
    values = pixels.astype(np.float64)
    if not np.isfinite(values).all():
        raise MediaError("image", "not_finite", "holds pixels that are no number")
    top = float(values.max())
    whites = (1.0, 255.0, 65535.0) if picture.mode == "F" else (255.0, 65535.0)
    white = next((white for white in whites if top <= white), 2.0**31 - 1)
    return np.clip(np.rint(values * (255.0 / white)), 0, 255).astype(np.uint8)


def _from_array(source: Any, limits: Limits) -> Image.Image:
    import numpy as np
    from PIL import Image

    is_tensor = hasattr(source, "detach") and hasattr(source, "cpu")
    if not is_tensor and not isinstance(source, np.ndarray):
        text = f"a {type(source).__name__} is no picture: give a path, bytes, a PIL image, an array or a tensor"
        raise MediaError("image", "unsupported", text)
    shape = tuple(int(length) for length in source.shape)
    channels_first = len(shape) == 3 and shape[0] in (1, 3, 4) and (is_tensor or shape[2] not in (1, 3, 4))
    if len(shape) not in (2, 3) or (len(shape) == 3 and not channels_first and shape[2] not in (1, 3, 4)):
        text = f"shape {list(shape)}: a picture is [h, w], [h, w, c] or [c, h, w] with 1, 3 or 4 channels"
        raise MediaError("image", "unsupported", text)
    _check_size((shape[2], shape[1]) if channels_first else (shape[1], shape[0]), limits)
    pixels = numpy_of(source, "image")
    if channels_first:
        pixels = pixels.transpose(1, 2, 0)
    pixels = _bytes_of(pixels)
    return Image.fromarray(
        np.ascontiguousarray(pixels[:, :, 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels)
    )


def numpy_of(source: Any, modality: str) -> np.ndarray[Any, Any]:
    """An array or a tensor, wherever it lives, as a numpy array; tensors without torch having to be imported here."""
    import numpy as np

    try:
        if not (hasattr(source, "detach") and hasattr(source, "cpu")):
            return np.asarray(source)
        tensor = source.detach().cpu()
        # numpy has no bfloat16
        return np.asarray((tensor.float() if tensor.is_floating_point() else tensor).numpy())
    except MemoryError:
        raise
    except Exception as error:  # sparse, quantised, without storage …
        raise MediaError(modality, "unsupported", f"a {type(source).__name__} whose values can't be read") from error


def _bytes_of(pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Pixel values in any type → 0..255."""
    import numpy as np

    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype == np.bool_:
        return pixels.astype(np.uint8) * np.uint8(255)
    if pixels.dtype == np.uint16:
        return (pixels >> 8).astype(np.uint8)
    if not np.issubdtype(pixels.dtype, np.integer) and not np.issubdtype(pixels.dtype, np.floating):
        raise MediaError("image", "unsupported", f"numbers of the type {pixels.dtype} are no pixels")
    low, high = float(pixels.min()), float(pixels.max())
    if np.issubdtype(pixels.dtype, np.integer):
        if low < 0 or high > 255:
            raise MediaError("image", "unsupported", f"whole numbers from {low:g} to {high:g}: pixels are 0..255")
        return pixels.astype(np.uint8)
    if not np.isfinite(pixels).all():
        raise MediaError("image", "not_finite", "holds pixels that are no number")
    if low < -_FLOAT_SLACK or high > 1 + _FLOAT_SLACK:
        raise MediaError(
            "image", "unsupported", f"floats from {low:g} to {high:g}: pixels are 0..1, before any normalisation"
        )
    scaled: np.ndarray[Any, np.dtype[np.uint8]] = np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8)
    return scaled
