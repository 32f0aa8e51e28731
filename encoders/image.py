"""Images: resize and crop on the host exactly as the reference does; normalisation in the module.

Shape suffixes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow
import torch
from PIL import Image
from torch import Tensor, nn

from mmpipe.encoders.base import BuiltEncoder, EncoderError, layers_path, output_dim
from mmpipe.encoders.hf import Source, pretrained

# A picture 1 pixel high and 10,000 wide would be resized to 224 × 2,240,000, in 4 bytes a pixel.
MAX_RESIZED_PIXELS = 64_000_000
RESAMPLING = {filter_.name.lower(): filter_ for filter_ in Image.Resampling}
# A decoder that scales averages squares of pixels; resized again by two and more, that is hardly to be told apart.
OVERSAMPLED = 2

Part = tuple[int, int, int, int]  # left, top, right, bottom, in pixels
# (a picture in RGB, the width and height it is resized to, the part that is seen, filter) → uint8 [3, height, width]
Resizer = Callable[[Image.Image, tuple[int, int], Part, str], Tensor]


@dataclass(frozen=True)
class ResizeCrop:
    """A PIL image → uint8 [3, height, width].

    mode: "shortest" (the whole crop is picture), "longest" (the whole picture is in the crop) or "squash".
    short_side: what "shortest" resizes to; larger than the crop where the reference crops a margin away.
    """

    height: int
    width: int
    mode: str = "shortest"
    short_side: int | None = None
    resample: str = "bicubic"
    fill: int = 0
    crop_down: bool = False  # half a pixel of crop: down (transformers), not to even (torchvision, open_clip)

    def __post_init__(self) -> None:
        if self.mode not in ("shortest", "longest", "squash") or self.resample not in RESAMPLING:
            raise EncoderError(f"this model resizes by '{self.mode}' with '{self.resample}', which is not supported")

    @property
    def smallest_side(self) -> int:
        """Pixels that the shorter side of a picture needs where it has been scaled down before."""
        return OVERSAMPLED * (self.short_side or max(self.height, self.width))

    def __call__(self, image: Image.Image, resized: Resizer | None = None) -> dict[str, Tensor]:
        """`resized`: what resizes in Pillow's place, to the same bits."""
        image, size = self._checked(image)
        return {"pixels": self._filled((resized or by_pillow)(image, size, self._seen(*size), self.resample))}

    def fast(self, image: Image.Image) -> dict[str, Tensor]:
        """As `__call__`, resampled by torch in a quarter of the time: it rounds otherwise, by 1 of 255, seldom more."""
        if self.resample not in ("bilinear", "bicubic"):
            return self(image)
        image, (width, height) = self._checked(image)
        whole = lent(image)
        x_CHW = _pixels(image) if whole is None else whole.permute(2, 0, 1)
        if (width, height) != image.size:
            size = (height, width)
            x_CHW = nn.functional.interpolate(x_CHW[None], size, mode=self.resample, antialias=True)[0]
        left, top, right, bottom = self._seen(width, height)
        return {"pixels": self._filled(x_CHW[:3, top:bottom, left:right])}

    def _checked(self, image: Image.Image) -> tuple[Image.Image, tuple[int, int]]:
        """The picture in RGB, and the width and height that it is to be resized to."""
        size = self._resized(*image.size)
        if size[0] * size[1] > MAX_RESIZED_PIXELS:
            raise EncoderError(f"a picture of {image.width}×{image.height} pixels is too elongated for this model")
        return image if image.mode == "RGB" else image.convert("RGB"), size

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        if self.mode == "squash":
            return self.width, self.height
        if self.mode == "shortest" and (self.height == self.width or self.short_side):
            side = self.short_side or self.height
            if width <= height:
                return side, int(side * height / width)
            return int(side * width / height), side
        ratios = height / self.height, width / self.width
        ratio = max(ratios) if self.mode == "longest" else min(ratios)
        return round(width / ratio), round(height / ratio)

    def _seen(self, width: int, height: int) -> Part:
        """Of a picture that has been resized: the crop from the middle; all of it where it is smaller."""
        whole = int if self.crop_down else round
        left, top = whole(max(0, width - self.width) / 2), whole(max(0, height - self.height) / 2)
        return left, top, left + min(width, self.width), top + min(height, self.height)

    def _filled(self, x_CHW: Tensor) -> Tensor:
        """Where the picture is smaller than the crop, `fill` around it."""
        beside, above = self.width - x_CHW.shape[2], self.height - x_CHW.shape[1]
        if beside or above:
            around = (beside // 2, beside - beside // 2, above // 2, above - above // 2)
            x_CHW = nn.functional.pad(x_CHW, around, value=self.fill)
        return x_CHW.contiguous()


def by_pillow(image: Image.Image, size: tuple[int, int], part: Part, resample: str) -> Tensor:
    """A picture in RGB, resized to (width, height) by Pillow → uint8 [3, height, width] of the part that is seen."""
    if size != image.size:
        image = image.resize(size, RESAMPLING[resample])
    return _pixels(image if part == (0, 0, *image.size) else image.crop(part))


def lent(image: Image.Image) -> Tensor | None:
    """A picture in RGB → uint8 [height, width, 4]: Pillow's own bytes, not to be written to, of which the fourth means
    nothing. None where it lends nobody any: it is older than 11.2, or has the picture in several blocks."""
    try:
        whole = torch.utils.dlpack.from_dlpack(pyarrow.array(image).values)
    except (AttributeError, TypeError, ValueError, pyarrow.ArrowInvalid):
        return None
    return whole.view(image.height, image.width, 4)


def _pixels(image: Image.Image) -> Tensor:
    """uint8 [3, height, width], the channels lying together; copied with Python's lock held."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class Normalised(nn.Module):
    """uint8 pixels [B, C, H, W] → visual(pixels · scale + shift): one affine that a graph pass can fold away."""

    def __init__(
        self, visual: nn.Module, mean: Sequence[float], std: Sequence[float], per_level: float = 1 / 255
    ) -> None:
        super().__init__()
        self.visual = visual
        mean_C, std_C = np.asarray(mean, np.float64), np.asarray(std, np.float64)
        self.scale_C11: Tensor
        self.shift_C11: Tensor
        for name, values in (("scale_C11", per_level / std_C), ("shift_C11", -mean_C / std_C)):
            self.register_buffer(name, torch.from_numpy(values).to(torch.float32)[:, None, None], persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        out: Tensor = self.visual(pixels.to(torch.float32) * self.scale_C11 + self.shift_C11)
        return out


def grey(height: int, width: int) -> Image.Image:
    """The example picture that capture runs on."""
    return Image.new("RGB", (width, height), (128, 128, 128))


class ProjectedVision(nn.Module):
    """A transformers vision tower and its projection, pixels [B, C, H, W] → [B, dim]."""

    def __init__(self, vision: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.vision, self.projection = vision, projection

    def forward(self, pixels: Tensor) -> Tensor:
        out: Tensor = self.projection(self.vision(pixel_values=pixels).pooler_output)
        return out


class FirstToken(nn.Module):
    """A transformers vision tower's class token after the last norm, pixels [B, C, H, W] → [B, dim]."""

    def __init__(self, vision: nn.Module) -> None:
        super().__init__()
        self.vision = vision

    def forward(self, pixels: Tensor) -> Tensor:
        out: Tensor = self.vision(pixel_values=pixels).last_hidden_state[:, 0]
        return out


def load_image(source: Source) -> BuiltEncoder:
    """`hf:` image models: CLIP and SigLIP (with prompts), ViT and DINOv2 (the class token)."""
    import transformers

    from mmpipe.encoders.text import paired_prompts

    kind = source.config().get("model_type")
    prompts, scale, notes = None, None, []
    cls: Any
    tower: nn.Module
    if kind in ("clip", "siglip"):
        cls = transformers.CLIPModel if kind == "clip" else transformers.SiglipModel
        model = pretrained(cls, source)
        tower = ProjectedVision(model.vision_model, getattr(model, "visual_projection", nn.Identity()))
        layer_count = model.config.vision_config.num_hidden_layers
        scale = float(model.logit_scale.exp())
        prompts = paired_prompts(source, model)
    elif kind in ("vit", "dinov2"):
        cls = transformers.ViTModel if kind == "vit" else transformers.Dinov2Model
        pooler = {"add_pooling_layer": False} if kind == "vit" else {}
        model = pretrained(cls, source, **pooler)
        tower, layer_count = FirstToken(model), model.config.num_hidden_layers
        notes.append("the embedding is the class token after the last norm")
    else:
        raise EncoderError(
            f"{source.model}: no image encoder for model_type '{kind}'; there are clip, siglip, vit, dinov2 "
            "(and open_clip:NAME/PRETRAINED)"
        )
    resize, mean, std, per_level = _read_processor(source)
    module = Normalised(tower, mean, std, per_level)
    example = grey(resize.height, resize.width)
    return BuiltEncoder(
        modality="image",
        dim=output_dim(module, resize(example)),
        module=module,
        prepare=resize,
        smallest_side=resize.smallest_side,
        prepare_fast=resize.fast,
        example=example,
        preprocessing=asdict(resize) | {"mean": list(mean), "std": list(std), "per_level": per_level},
        layers=layers_path(module, layer_count),
        prompts=prompts,
        logit_scale=scale,
        notes=[*notes, "pictures are resized with Pillow, as the reference's Pillow processor does"],
        files=source.files(),
    )


def _read_processor(source: Source) -> tuple[ResizeCrop, list[float], list[float], float]:
    """preprocessor_config.json → resize, mean, std, factor."""
    config = source.optional("preprocessor_config.json", "processor_config.json")
    config = config.get("image_processor", config)
    if not config:
        raise EncoderError(f"{source.model}: {source.folder} has no preprocessor_config.json")
    cropped = bool(config.get("do_center_crop", False))
    size = _size(config.get("size", 224), square=not cropped)
    crop = _size(config.get("crop_size"), square=True)
    resample = Image.Resampling(config.get("resample", 2)).name.lower()
    if not config.get("do_resize", True):
        raise EncoderError(f"{source.model}: its processor does not resize, so pictures have no common shape")
    if "shortest_edge" in size:
        side = size["shortest_edge"]
        if not cropped:
            raise EncoderError(f"{source.model}: its processor does not crop, so pictures have no common shape")
        crop = crop or {"height": side, "width": side}
        resize = ResizeCrop(crop["height"], crop["width"], "shortest", side, resample, crop_down=True)
    elif cropped and crop not in ({}, size):
        raise EncoderError(f"{source.model}: resizing to {size} and cropping to {crop} is not supported")
    else:
        resize = ResizeCrop(size["height"], size["width"], "squash", None, resample)
    factor = float(config.get("rescale_factor", 1 / 255)) if config.get("do_rescale", True) else 1.0
    if not config.get("do_normalize", True):
        return resize, [0.0] * 3, [1.0] * 3, factor
    mean, std = config.get("image_mean"), config.get("image_std")
    if not mean or not std or math.prod(std) == 0:
        raise EncoderError(f"{source.model}: preprocessor_config.json gives no image_mean and image_std")
    return resize, list(mean), list(std), factor


def _size(value: Any, *, square: bool) -> dict[str, int]:
    if isinstance(value, int):
        return {"height": value, "width": value} if square else {"shortest_edge": value}
    return {key: int(number) for key, number in (value or {}).items()}
