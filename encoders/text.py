"""Text: tokenised on the host to a fixed length; the transformer, its pooling and any projection in the module.

Shape suffixes: B batch, T tokens, D width.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mmpipe.encoders.base import BuiltEncoder, EncoderError, layers_path, output_dim
from mmpipe.encoders.hf import Source, load_strictly, pretrained, tokenizer_of
from mmpipe.encoders.hub import read_json

LONGEST_DEFAULT = 512  # tokens, where a plain folder sets no limit of its own
EXAMPLE = "a photo of a red shoe"
PROMPT_BATCH = 32
_CHARACTERS_A_TOKEN = 32  # at first; a word of English has five

# Encoders that pool over tokens, by model_type; the number: positions lost to padding_idx (counted from pad + 1).
POOLED = {
    "bert": 0,
    "distilbert": 0,
    "electra": 0,
    "albert": 0,
    "roberta": 2,
    "xlm-roberta": 2,
    "camembert": 2,
    "mpnet": 2,
}
PAIRED = ("clip", "clap", "siglip")
POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


Found = TypeVar("Found")


def as_far_as_read(text: str, tokens: int, encode: Callable[[str], Found], is_full: Callable[[Found], bool]) -> Found:
    """encode(text), for a tokeniser that cuts the end off, with no more of a long text than it takes.

    A beginning is enough that fills the tokens, and to the same ones as twice as much of it: nothing that comes after a
    word that is whole changes it.
    """
    length = _CHARACTERS_A_TOKEN * tokens
    if len(text) > 2 * length:
        found = encode(text[:length])
        while 2 * length < len(text):
            before, found = found, encode(text[: 2 * length])
            if found == before and is_full(found):
                return found
            length *= 2
    return encode(text)


class Tokens:
    """A transformers tokeniser's own core, set to cut and to pad: a str → ids and mask, each of `length` numbers.

    It can be written down, and read again without transformers.
    """

    def __init__(self, core: Any) -> None:
        self._core = core

    @classmethod
    def of(cls, tokenizer: Any, length: int) -> Tokens | None:
        """None where the tokeniser is written in Python. The tokeniser itself is not to be called afterwards."""
        core = getattr(tokenizer, "backend_tokenizer", None)
        if core is None:
            return None
        tokenizer(EXAMPLE, padding="max_length", truncation=True, max_length=length)  # what sets its core
        return cls(core)

    @classmethod
    def read(cls, written: str) -> Tokens:
        from tokenizers import Tokenizer

        told = json.loads(written)
        core = Tokenizer.from_str(told["core"])
        core.encode_special_tokens = told["encode_special_tokens"]
        return cls(core)

    def written(self) -> str:
        """Raises EncoderError where a part of it can't be written."""
        try:
            core = self._core.to_str()
        except Exception as error:  # a part in Python: tokenizers has no error of its own
            raise EncoderError(f"its tokeniser can't be written: {error}") from error
        # which tokenizers leaves out
        return json.dumps({"core": core, "encode_special_tokens": bool(self._core.encode_special_tokens)})

    def cuts_the_end(self) -> bool:
        """Whether what it reads of a long text is the beginning."""
        return (self._core.truncation or {}).get("direction") == "right"

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokens.read, (self.written(),)

    def __call__(self, text: str) -> tuple[list[int], list[int]]:
        found = self._core.encode(text)
        return found.ids, found.attention_mask


@dataclass(frozen=True)
class Tokenise:
    """A str → int64 input_ids [T] (and attention_mask [T]), cut or padded to max_tokens."""

    tokens: Tokens | Any  # or a tokeniser of transformers'
    max_tokens: int
    masked: bool
    prefix: str = ""
    lower: bool = False

    def __call__(self, text: str) -> dict[str, Tensor]:
        if not isinstance(text, str):
            raise EncoderError(f"a text encoder takes a str, not a {type(text).__name__}")
        text = self.prefix + text
        ids, mask = self._as_far_as_read(text.lower() if self.lower else text)
        found = {"input_ids": ids, "attention_mask": mask} if self.masked else {"input_ids": ids}
        return {name: torch.tensor(numbers, dtype=torch.int64) for name, numbers in found.items()}

    def _as_far_as_read(self, text: str) -> tuple[list[int], list[int]]:
        """As of the whole text: a tokeniser cuts when it has all tokens, which take 400 bytes a character."""
        if not self._cuts_the_end():
            return self._encoded(text)
        return as_far_as_read(text, self.max_tokens, self._encoded, lambda found: all(found[1]))

    def _cuts_the_end(self) -> bool:
        if isinstance(self.tokens, Tokens):
            return self.tokens.cuts_the_end()
        return getattr(self.tokens, "truncation_side", "") == "right"

    def _encoded(self, text: str) -> tuple[list[int], list[int]]:
        if isinstance(self.tokens, Tokens):
            return self.tokens(text)
        encoded = self.tokens(
            text, padding="max_length", truncation=True, max_length=self.max_tokens, return_attention_mask=True
        )
        return encoded["input_ids"], encoded["attention_mask"]


def _tokenise(tokenizer: Any, length: int, **settings: Any) -> Tokenise:
    return Tokenise(Tokens.of(tokenizer, length) or tokenizer, length, **settings)


class Pool(nn.Module):
    """Token states [B, T, D] and mask [B, T] → [B, D · modes]; the padding is on the right and never counts."""

    def __init__(self, modes: Sequence[str]) -> None:
        super().__init__()
        self.modes = tuple(modes)
        if unknown := set(self.modes) - set(POOLING_FLAGS.values()):
            raise EncoderError(
                f"no pooling '{', '.join(sorted(unknown))}'; there are {', '.join(POOLING_FLAGS.values())}"
            )

    def forward(self, states_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        weights_BT1 = mask_BT.to(states_BTD.dtype).unsqueeze(-1)
        pooled = [self._one(mode, states_BTD, weights_BT1) for mode in self.modes]
        return pooled[0] if len(pooled) == 1 else torch.cat(pooled, dim=-1)

    @staticmethod
    def _one(mode: str, states_BTD: Tensor, weights_BT1: Tensor) -> Tensor:
        if mode == "cls":
            return states_BTD[:, 0]
        if mode == "max":
            return states_BTD.masked_fill(weights_BT1 == 0, float("-inf")).amax(dim=1)
        positions_T1 = torch.arange(1, states_BTD.shape[1] + 1, device=states_BTD.device, dtype=states_BTD.dtype)[
            :, None
        ]
        if mode == "lasttoken":
            last_BT1 = (positions_T1 == weights_BT1.sum(dim=1, keepdim=True)).to(states_BTD.dtype)
            return (states_BTD * last_BT1).sum(dim=1)
        if mode == "weightedmean":
            weights_BT1 = weights_BT1 * positions_T1
        total_B1 = weights_BT1.sum(dim=1).clamp(min=1e-9)
        return (states_BTD * weights_BT1).sum(dim=1) / (total_B1.sqrt() if mode == "mean_sqrt_len_tokens" else total_B1)


class PooledText(nn.Module):
    """input_ids, attention_mask [B, T] → [B, dim]: transformer, pooling, then what else the folder lists."""

    def __init__(self, transformer: nn.Module, pool: Pool, then: Sequence[nn.Module] = ()) -> None:
        super().__init__()
        self.transformer, self.pool, self.then = transformer, pool, nn.Sequential(*then)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states_BTD = self.transformer(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        out: Tensor = self.then(self.pool(states_BTD, attention_mask))
        return out


class L2Normalised(nn.Module):
    def forward(self, x_BD: Tensor) -> Tensor:
        return nn.functional.normalize(x_BD, dim=-1)


class ProjectedText(nn.Module):
    """A paired model's text tower: input_ids (and attention_mask) [B, T] → [B, dim], not normalised."""

    def __init__(self, tower: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.tower, self.projection = tower, projection

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        out: Tensor = self.projection(self.tower(input_ids=input_ids, attention_mask=attention_mask).pooler_output)
        return out


@dataclass(frozen=True)
class Prompts:
    """Texts → embeddings [n, dim], in batches, through a text module and its tokeniser."""

    module: nn.Module
    prepare: Callable[[str], dict[str, Tensor]]

    def __call__(self, texts: Sequence[str]) -> Tensor:
        done = []
        with torch.inference_mode():
            for start in range(0, len(texts), PROMPT_BATCH):
                rows = [self.prepare(text) for text in texts[start : start + PROMPT_BATCH]]
                done.append(self.module(**{name: torch.stack([row[name] for row in rows]) for name in rows[0]}))
        if not done:
            raise EncoderError("no prompts were given")
        return torch.cat(done).clone()


def load_text(source: Source, max_tokens: int | None) -> BuiltEncoder:
    """`hf:` text models: a sentence-transformers folder as it says, a plain encoder with mean pooling, CLIP, CLAP."""
    chain = _read_chain(source)
    source, kind = chain.source, chain.source.config().get("model_type")
    if kind in PAIRED and not chain.listed:
        return _load_paired(source, kind, max_tokens)
    if kind not in POOLED:
        raise EncoderError(
            f"{source.model}: no text encoder for model_type '{kind}'; there are {', '.join([*POOLED, *PAIRED])}"
        )
    model = _load_transformer(source, kind)
    tokenizer = tokenizer_of(source)
    positions = model.config.max_position_embeddings - POOLED[kind]
    length = _length(
        source.model, max_tokens, positions, tokenizer, chain.max_tokens or tokenizer.model_max_length, LONGEST_DEFAULT
    )
    prepare = _tokenise(tokenizer, length, masked=True, prefix=chain.prefix, lower=chain.lower)
    module = PooledText(model, Pool(chain.pooling), chain.then).eval()
    notes = [f"text is cut or padded to {length} tokens"]
    if not chain.listed:
        notes.append("the folder has no modules.json: the embedding is the mean over tokens that are no padding")
    return BuiltEncoder(
        modality="text",
        dim=output_dim(module, prepare(EXAMPLE)),
        module=module,
        prepare=prepare,
        example=EXAMPLE,
        preprocessing={
            "max_tokens": length,
            "prefix": chain.prefix,
            "lower": chain.lower,
            "pooling": list(chain.pooling),
            "then": [type(part).__name__ for part in chain.then],
        },
        layers=layers_path(module, model.config.num_hidden_layers),
        mask="attention_mask",
        prompts=Prompts(module, prepare),
        notes=notes,
        files=source.files(),
    )


def paired_prompts(source: Source, model: Any, max_tokens: int | None = None) -> Prompts:
    """The text tower of a CLIP, CLAP or SigLIP model that is already loaded."""
    kind = model.config.model_type
    tokenizer = tokenizer_of(source)
    lost = 2 if kind == "clap" else 0
    positions = model.config.text_config.max_position_embeddings - lost
    length = _length(source.model, max_tokens, positions, tokenizer, tokenizer.model_max_length, positions)
    projection = getattr(model, "text_projection", nn.Identity())  # SigLIP's is the tower's own head
    module = ProjectedText(model.text_model, projection).eval()
    return Prompts(module, _tokenise(tokenizer, length, masked=kind == "clap"))


def _load_paired(source: Source, kind: str, max_tokens: int | None) -> BuiltEncoder:
    import transformers

    cls = {"clip": transformers.CLIPModel, "clap": transformers.ClapModel, "siglip": transformers.SiglipModel}[kind]
    model = pretrained(cls, source)
    if kind == "siglip" and max_tokens not in (None, model.config.text_config.max_position_embeddings):
        raise EncoderError(f"{source.model}: SigLIP reads its padding, so max_tokens can't be changed")
    prompts = paired_prompts(source, model, max_tokens)
    prepare = prompts.prepare
    assert isinstance(prepare, Tokenise)
    return BuiltEncoder(
        modality="text",
        dim=output_dim(prompts.module, prepare(EXAMPLE)),
        module=prompts.module,
        prepare=prepare,
        example=EXAMPLE,
        preprocessing={"max_tokens": prepare.max_tokens, "prefix": "", "lower": False, "pooling": [kind], "then": []},
        layers=layers_path(prompts.module, model.config.text_config.num_hidden_layers),
        mask="attention_mask" if prepare.masked else None,
        prompts=prompts,
        logit_scale=float((model.logit_scale_t if kind == "clap" else model.logit_scale).exp()),
        notes=[f"text is cut or padded to {prepare.max_tokens} tokens"],
        files=source.files(),
    )


def _load_transformer(source: Source, kind: str) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    cls: Any = MODEL_MAPPING[type(AutoConfig.for_model(kind))]
    # A pooler that no pooling reads is left out: many checkpoints have none.
    unused = {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(cls).parameters else {}
    model = pretrained(cls, source, **unused)
    if hasattr(model, "pooler"):
        model.pooler = None
    return model


def _length(model: str, asked: int | None, positions: int, tokenizer: Any, own: int, longest: int) -> int:
    length = asked if asked is not None else min(own, positions, longest)
    least = tokenizer.num_special_tokens_to_add() + 1
    if not least <= length <= positions:
        what = f"max_tokens is {length}; this model takes {least} to {positions} tokens"
        raise EncoderError(f"{model}: {what}", "model" if asked is None else "max_tokens")
    return length


@dataclass(frozen=True)
class _Chain:
    """What a folder says comes before and after its transformer."""

    source: Source
    listed: bool  # modules.json is there
    pooling: tuple[str, ...] = ("mean",)
    then: tuple[nn.Module, ...] = ()
    max_tokens: int | None = None
    lower: bool = False
    prefix: str = ""


def _read_chain(source: Source) -> _Chain:
    """modules.json as sentence-transformers writes it: Transformer, Pooling, then Dense and Normalize if listed."""
    path = source.folder / "modules.json"
    if not path.is_file():
        return _Chain(source, listed=False)
    parts = [(str(part["type"]).rpartition(".")[2], source.within(part["path"])) for part in _parts(path, source.model)]
    names = [name for name, _ in parts]
    if names[:2] != ["Transformer", "Pooling"] or set(names[2:]) - {"Dense", "Normalize", "Dropout"}:
        raise EncoderError(
            f"{source.model}: modules.json lists {', '.join(names)}; supported are Transformer, Pooling, then "
            "any of Dense, Normalize"
        )
    transformer, pooling = parts[0][1], read_json(parts[1][1].folder / "config.json", source.model)
    modes = (
        pooling.get("pooling_mode") or [mode for flag, mode in POOLING_FLAGS.items() if pooling.get(flag)] or ["mean"]
    )
    limits = transformer.optional("sentence_bert_config.json", *(f"sentence_{kind}_config.json" for kind in POOLED))
    prompts = source.optional("config_sentence_transformers.json")
    prefix = (prompts.get("prompts") or {}).get(prompts.get("default_prompt_name") or "", "")
    if prefix and not pooling.get("include_prompt", True):
        raise EncoderError(f"{source.model}: pooling without the prompt's tokens is not supported")
    return _Chain(
        transformer,
        listed=True,
        pooling=(modes,) if isinstance(modes, str) else tuple(modes),
        then=tuple(
            _dense(part) if name == "Dense" else L2Normalised() for name, part in parts[2:] if name != "Dropout"
        ),
        max_tokens=limits.get("max_seq_length"),
        lower=bool(limits.get("do_lower_case")),
        prefix=prefix,
    )


def _parts(path: Path, model: str) -> list[dict[str, Any]]:
    try:
        parts: list[dict[str, Any]] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise EncoderError(f"{model}: {path} can't be read: {error}") from error
    return parts


def _dense(source: Source) -> nn.Module:
    config = read_json(source.folder / "config.json", source.model)
    activation = str(config.get("activation_function", "torch.nn.modules.activation.Tanh")).rpartition(".")[2]
    known = {"Identity": nn.Identity, "Tanh": nn.Tanh, "ReLU": nn.ReLU, "GELU": nn.GELU, "Sigmoid": nn.Sigmoid}
    if activation not in known or config.get("use_residual") or config.get("module_input_name", EMBEDDING) != EMBEDDING:
        raise EncoderError(f"{source.model}: {source.folder}: this kind of Dense is not supported: {config}")
    linear = nn.Linear(config["in_features"], config["out_features"], bias=config.get("bias", True))
    holder = nn.ModuleDict({"linear": linear})
    names: list[Path] = [source.folder / "model.safetensors", source.folder / "pytorch_model.bin"]
    file = next((path for path in names if path.is_file()), None)
    if file is None:
        raise EncoderError(f"{source.model}: {source.folder} holds no weights")
    load_strictly(holder, file, source.model)
    return nn.Sequential(linear, known[activation]())


EMBEDDING = "sentence_embedding"
