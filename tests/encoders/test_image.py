"""Image encoders against the reference libraries on the same weights and pictures."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from mmpipe.encoders import EncoderError, load
from mmpipe.encoders import image as image_encoders
from mmpipe.encoders.image import ResizeCrop, by_pillow


def _open_clip(folder):
    import open_clip

    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    return model.eval(), preprocess, open_clip.get_tokenizer(f"local-dir:{folder}")


@pytest.mark.parametrize("name", ["open_clip", "open_clip-squash", "open_clip-longest"])
def test_open_clip_images(name, models, kit):
    folder = models(name)
    reference, preprocess, _ = _open_clip(folder)
    encoder = load(f"open_clip:{folder}", "image")
    images = kit.pictures(32)
    whole = kit.batch(encoder, images)
    assert whole["pixels"].dtype == torch.uint8
    for rows in kit.BATCHES:
        with torch.inference_mode():
            expected = reference.encode_image(torch.stack([preprocess(image) for image in images[:rows]]))
        kit.agree(kit.run(encoder.module, {"pixels": whole["pixels"][:rows]}), expected, name)
    if name == "open_clip":
        kit.exports(encoder, images, name)
    assert encoder.layers == "visual.transformer.resblocks"
    assert len(encoder.module.get_submodule(encoder.layers)) == 3
    assert encoder.logit_scale == pytest.approx(1 / 0.07, rel=1e-4)


@pytest.mark.parametrize("name", ["open_clip", "open_clip-squash", "open_clip-longest"])
def test_prepared_pixels_are_the_reference_s_to_the_bit(name, models, kit):
    _, preprocess, _ = _open_clip(models(name))
    encoder = load(f"open_clip:{models(name)}", "image")
    to_levels = type(preprocess)(preprocess.transforms[:-1])  # all but the normalisation
    for image in kit.pictures(40):
        expected = (to_levels(image) * 255).round().to(torch.uint8)
        assert torch.equal(encoder.prepare(image)["pixels"], expected), image.size


def test_open_clip_text_and_prompts(models, kit):
    reference, _, tokenizer = _open_clip(models("open_clip"))
    encoder = load(str(models("open_clip")), "text")
    texts = kit.texts(32)
    for rows in kit.BATCHES:
        with torch.inference_mode():
            expected = reference.encode_text(tokenizer(texts[:rows]))
        kit.agree(kit.run(encoder.module, kit.batch(encoder, texts[:rows])), expected, "open_clip text")
    kit.exports(encoder, texts, "open_clip text")
    assert encoder.layers == "clip.transformer.resblocks"
    assert encoder.mask is None
    image = load(str(models("open_clip")), "image")
    kit.agree(image.prompts(texts), expected, "prompts of the image encoder")


def test_open_clip_text_of_fewer_tokens(models, kit):
    reference, _, tokenizer = _open_clip(models("open_clip"))
    encoder = load(str(models("open_clip")), "text", max_tokens=12)
    texts = ["a red shoe", "", "rain"]
    assert encoder.prepare("a red shoe")["input_ids"].shape == (12,)
    with torch.inference_mode():
        expected = reference.encode_text(tokenizer(texts))
    kit.agree(kit.run(encoder.module, kit.batch(encoder, texts)), expected, "12 of 40 tokens")
    assert encoder.prepare("rain " * 50)["input_ids"][-1] == 49407  # cut, but ended
    with pytest.raises(EncoderError, match="takes 3 to 40"):
        load(str(models("open_clip")), "text", max_tokens=41)


def test_open_clip_reads_no_more_of_a_long_text_than_it_takes(models, monkeypatch):
    """To the same ids; one word of 200,000 letters would take its tokeniser a quarter of an hour."""
    _, _, tokenizer = _open_clip(models("open_clip"))
    prepare = load(str(models("open_clip")), "text").prepare
    bpe, longest = type(tokenizer).bpe, [0]

    def seen(self, word):
        longest[0] = max(longest[0], len(word))
        return bpe(self, word)

    texts = [
        "a red shoe, " * 400,
        "犬が好き。Straße &amp;amp;lt; " * 300,
        "x " * 3000,
        "a" * 3000,
        " \n" * 3000 + "end",
    ]
    for text in texts:
        assert prepare(text)["input_ids"].tolist() == tokenizer([text])[0].tolist(), text[:20]
    monkeypatch.setattr(type(tokenizer), "bpe", seen)
    assert prepare("acgt" * 50_000)["input_ids"][-1] == 49407
    assert 1000 < longest[0] < 10_000


def test_open_clip_does_not_remember_words_for_ever(models, monkeypatch):
    monkeypatch.setattr("mmpipe.encoders.clip._MOST_WORDS", 50)
    prepare = load(str(models("open_clip")), "text").host
    before = prepare("a red shoe")["input_ids"].tolist()
    for number in range(30):
        prepare(" ".join(f"word{'abcdefghij'[number % 10]}{'xyz'[part]}{number}" for part in range(3)))
    assert len(prepare.tokenizer.cache) < 60
    assert prepare("a red shoe")["input_ids"].tolist() == before


def test_full_size_vit_b_32(tmp_path, kit):
    import open_clip

    torch.manual_seed(0)
    reference = kit.scramble(open_clip.create_model("ViT-B-32", pretrained=None))
    file = tmp_path / "weights.pt"
    torch.save(reference.state_dict(), file)
    try:
        encoder = load("open_clip:ViT-B-32/weights.pt", "image", base=tmp_path)
    finally:
        file.unlink()
    preprocess = open_clip.image_transform((224, 224), is_train=False)
    images = kit.pictures(32)
    with torch.inference_mode():
        expected = reference.encode_image(torch.stack([preprocess(image) for image in images]))
        words = reference.encode_text(open_clip.get_tokenizer("ViT-B-32")(["a red shoe"]))
    for rows in (1, 3, 32):
        ours = kit.run(encoder.module, kit.batch(encoder, images[:rows]))
        kit.agree(ours, expected[:rows], "ViT-B-32")
    kit.agree(encoder.prompts(["a red shoe"]), words, "ViT-B-32 prompts")
    assert encoder.dim == 512
    assert len(encoder.module.get_submodule(encoder.layers)) == 12


@pytest.mark.parametrize("name", ["clip", "siglip", "vit", "dinov2"])
def test_transformers_images(name, models, kit):
    import transformers

    folder = models(name)
    encoder = load(f"hf:{folder}", "image")
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    cls = {
        "clip": "CLIPVisionModelWithProjection",
        "siglip": "SiglipVisionModel",
        "vit": "ViTModel",
        "dinov2": "Dinov2Model",
    }[name]
    reference = getattr(transformers, cls).from_pretrained(folder).eval()
    images = kit.pictures(32)
    whole = kit.batch(encoder, images)
    for rows in kit.BATCHES:
        pixels = torch.cat([processor(image, return_tensors="pt")["pixel_values"] for image in images[:rows]])
        with torch.inference_mode():
            out = reference(pixel_values=pixels)
        kind = {"clip": "image_embeds", "siglip": "pooler_output"}.get(name)
        expected = out.last_hidden_state[:, 0] if kind is None else out[kind]
        kit.agree(kit.run(encoder.module, {"pixels": whole["pixels"][:rows]}), expected, name)
    kit.exports(encoder, images, name)
    assert len(encoder.module.get_submodule(encoder.layers)) == 3
    assert (encoder.prompts is not None) == (name in ("clip", "siglip"))


def test_a_row_depends_on_its_picture_alone(models, kit):
    encoder = load(str(models("open_clip")), "image")
    images = kit.pictures(6)
    there, back = kit.batch(encoder, images), kit.batch(encoder, images[::-1])
    assert torch.equal(there["pixels"], back["pixels"].flip(0))
    assert torch.equal(kit.run(encoder.module, there)[1], kit.run(encoder.module, back)[4])


def test_normalisation_is_one_affine_in_the_module(models):
    encoder = load(str(models("open_clip")), "image")
    levels = torch.arange(256, dtype=torch.float32)
    scale, shift = encoder.module.scale_C11.flatten(), encoder.module.shift_C11.flatten()
    for channel, (mean, std) in enumerate(((0.4, 0.2), (0.5, 0.3), (0.6, 0.25))):
        assert torch.allclose(levels * scale[channel] + shift[channel], (levels / 255 - mean) / std, atol=1e-6)


def test_a_thread_of_a_picture_is_refused():
    with pytest.raises(EncoderError, match="1×20000 pixels is too elongated"):
        ResizeCrop(224, 224)(Image.fromarray(np.zeros((20000, 1, 3), np.uint8)))


def test_of_an_elongated_picture_only_what_is_seen_is_copied():
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (1600, 8, 3), np.uint8))
    found = by_pillow(image, (224, 44_800), (0, 22_288, 224, 22_512), "bicubic")
    assert found.untyped_storage().nbytes() == found.numel() == 3 * 224 * 224
    whole = np.asarray(image.resize((224, 44_800), Image.Resampling.BICUBIC))
    assert torch.equal(found, torch.from_numpy(whole[22_288:22_512].copy()).permute(2, 0, 1))


def test_what_is_not_supported_is_said(models, tmp_path):
    with pytest.raises(EncoderError, match="no image encoder for model_type 'bert'"):
        load(f"hf:{models('bert')}", "image")
    with pytest.raises(EncoderError, match="none for audio"):
        load(str(models("open_clip")), "audio")
    folder = tmp_path / "clip"
    shutil.copytree(models("clip"), folder)
    path = next(folder.glob("*processor_config.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_center_crop": False}))
    with pytest.raises(EncoderError, match="does not crop"):
        load(f"hf:{folder}", "image")


@pytest.mark.parametrize("resample", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize(
    "settings",
    [
        {"height": 32, "width": 32},
        {"height": 32, "width": 32, "short_side": 40, "crop_down": True},
        {"height": 24, "width": 40},
        {"height": 32, "width": 32, "mode": "longest", "fill": 7},
        {"height": 32, "width": 24, "mode": "squash"},
    ],
)
def test_the_fast_resampling_is_a_level_off_and_seldom_more(settings, resample, kit):
    resize = ResizeCrop(resample=resample, **settings)
    soft = [image.resize((2 * image.width + 40, 3 * image.height + 40)) for image in kit.pictures(24)]
    for image in (*soft, Image.new("L", (32, 32), 9), Image.new("RGB", (3, 50), "red")):
        exact, fast = resize(image)["pixels"], resize.fast(image)["pixels"]
        assert (fast.shape, fast.dtype, fast.is_contiguous()) == (exact.shape, torch.uint8, True)
        off = (fast.int() - exact.int()).abs()
        assert off.float().mean() < 0.5
        assert (off > 1).float().mean() < 0.01  # which direction goes first, and is rounded first
        assert off.max() <= (0 if resample == "lanczos" else 8)  # torch knows no lanczos
    with pytest.raises(EncoderError, match="too elongated"):
        ResizeCrop(224, 224, resample=resample).fast(Image.new("RGB", (1, 10_000)))


@pytest.mark.parametrize("size", [(1, 1), (70, 33), (900, 600), (2600, 2100)])  # the last is in several blocks
def test_pillow_s_own_bytes_are_resampled_to_what_a_copy_is(size, monkeypatch):
    noise = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), np.uint8)
    picture, resize = Image.fromarray(noise), ResizeCrop(32, 32)
    own = resize.fast(picture)["pixels"]
    monkeypatch.setattr(image_encoders, "lent", lambda image: None)
    assert torch.equal(own, resize.fast(picture)["pixels"])
    assert np.array_equal(np.asarray(picture), noise)


@pytest.mark.parametrize(
    ("settings", "side"),
    [
        ({"height": 224, "width": 224}, 448),
        ({"height": 224, "width": 224, "short_side": 256}, 512),
        ({"height": 224, "width": 320, "mode": "squash"}, 640),
    ],
)
def test_a_picture_is_never_resized_up_for_having_been_scaled_down(settings, side):
    assert ResizeCrop(**settings).smallest_side == side
