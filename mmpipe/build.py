"""Configuration → encoders, head and exits → the fused graph. Runs once; what it returns is all that is needed later.

The only place where encoders, fusion and graphs meet; their errors become mmpipe's here.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmpipe.answers import FULL
from mmpipe.calibrated import (
    KEY,
    Calibration,
    Gating,
    by_hand,
    certified,
    core_fingerprint,
    mismatch,
    no_second_look,
    read_calibration,
    unlike,
)
from mmpipe.capturing import Shorter, captured_encoder, captured_head, shorter
from mmpipe.config import Config, EncoderConfig, ExitConfig, ModalityConfig
from mmpipe.encoders import BuiltEncoder, Encoder, EncoderError, MissingPackage, pull
from mmpipe.encoders.image import ResizeCrop
from mmpipe.encoders.own import forget_others, source_digest
from mmpipe.errors import ConfigError, MissingExtraError, MmpipeError, ModelError
from mmpipe.fusion.checkpoint import Checkpoint, load_head, probe, read_checkpoint
from mmpipe.fusion.heads import HeadError, ZeroShotHead, prompt_prototypes
from mmpipe.graphs.fuse import ExitSpec, FusedGraph, PooledLayer, Probe, fuse
from mmpipe.graphs.passes import optimise
from mmpipe.graphs.plan import HEAD, GraphError
from mmpipe.remembering import known_encoder, known_prompts
from mmpipe.resizing import Resized

_TEXTS = (".json", ".txt", ".model", ".bpe", ".yaml")


@dataclass(frozen=True)
class Preparation:
    """The host side of one encoder: one decoded medium → one row of each input."""

    modality: str
    dim: int
    prepare: Callable[[Any], dict[str, Tensor]]
    max_seconds: float | None  # sound beyond this is not heard
    settings: Mapping[str, Any]  # all that shapes prepare(); for the fingerprint
    notes: tuple[str, ...]
    decoded_seconds: float | None = None  # sound beyond this is not decoded: what is heard, and its resampling's margin
    smallest_side: int | None = None  # pixels: pictures may be decoded smaller, to no less; None: as they are
    grey: bool = False  # pictures that are grey may stay so


@dataclass(frozen=True)
class Built:
    """What a configuration became."""

    graph: FusedGraph
    preparations: Mapping[str, Preparation]  # in encoder order
    labels: tuple[str, ...]  # empty for embed
    thresholds: tuple[float, ...]  # one per exit but the last
    removed: Mapping[str, int]  # pass → nodes (shared weights: bytes) that it removed
    notes: tuple[str, ...]
    hashing: Future[str]  # → core
    shorter: Mapping[str, Shorter]  # branches that may be computed at the length of a text
    temperatures: tuple[float, ...] = (1.0,)  # one per exit
    confidence: str = "max_probability"
    max_disagreement: float | None = None  # what the exits promise; None: nothing
    head: nn.Module | None = None  # as it was captured; None for embed
    calibration: Calibration | None = None  # whose exits these are; the caller checks type and backend

    @property
    def core(self) -> str:
        """Fingerprint of the model less its exits: what a calibration binds to."""
        return self.hashing.result()


def build(
    config: Config,
    *,
    say: Callable[[str], None] = lambda text: None,
    without_exits: str = "",
    encoders_only: bool = False,
) -> Built:
    """Load encoders and head, capture and fuse them. `say` is told what takes time. ConfigError or ModelError.

    `without_exits`: why the calibration's exits are left out, where they are. `encoders_only`: no head and no exits; of
    each layer that an exit asks for, the pooled state is an output beside the embeddings. What heads are trained on.
    """
    calibration = read_calibration(config) if config.fusion.calibration is not None and not encoders_only else None
    if calibration is not None and not without_exits and (why := unlike(calibration, config)):
        without_exits = not_bound(config, why)
    encoders: dict[str, Encoder] = {}
    modality: str
    for modality, settings in config.encoders.items():
        say(f"loading {modality}: {settings.model}")
        with _as_config_error(config, f"encoders.{modality}.model"):
            encoders[modality] = known_encoder(settings, modality, config.source.folder)
    labels = config.all_labels
    dims = {modality: encoder.dim for modality, encoder in encoders.items()}
    classifies = config.task == "classify" and not encoders_only
    checkpoint = _checkpoint(config) if classifies else None
    head = _head(config, encoders, dims, checkpoint) if classifies else None
    modules = {modality: encoder.module for modality, encoder in encoders.items()}
    by_name: dict[str, EncoderConfig] = {str(name): its for name, its in config.encoders.items()}
    fast = config.input.decode == "fast"
    prepared_by = {name: _settings(encoder, by_name[name].options, fast) for name, encoder in encoders.items()}
    core = core_fingerprint(modules, head, config, prepared_by)
    del modules  # the encoders let them go once they are captured
    if calibration is not None and not without_exits and calibration.binds_to.model != core.result():
        without_exits = not_bound(config, mismatch(calibration, model=core.result(), dtype="", backends=()) or "")
    gating = _gating(config, calibration, without_exits)
    say("capturing and fusing")
    branches, shortened = [], {}
    for modality, encoder in encoders.items():
        with _as_config_error(config, f"encoders.{modality}.model"):
            about = {"model": by_name[modality].model, "preparation": prepared_by[modality]}
            branches.append(captured_encoder(encoder, modality, about))
            if (may_be := shorter(encoder, modality, about)) is not None:
                shortened[modality] = may_be
    exits = gating.exits if classifies else ()
    specs = [_exit_spec(config, number, exit_, encoders, checkpoint) for number, exit_ in enumerate(exits)]
    states = _states(config, encoders) if encoders_only else []
    fused_head = None
    if head is not None:
        specs.append(ExitSpec(FULL, tuple(encoders)))
        with _as_config_error(config, "fusion.head"):
            fused_head = captured_head(head, dims, len(labels), own=":" in config.fusion.head)
    with _as_config_error(config, "fusion.exits" if specs[:-1] or states else "fusion.head"):
        graph = fuse(branches, fused_head, specs, states)
        removed = optimise(graph)
    notes = [f"{modality}: {note}" for modality, encoder in encoders.items() for note in _notes(encoder, fast)]
    if not without_exits and (why := no_second_look(config, calibration)):
        notes.append(why)
    audit = config.fusion.audit
    if audit is not None and audit.on_drift == "disable" and gating.max_disagreement is None:
        notes.append("fusion.audit: on_drift: disable does nothing without a calibration, which promises something")
    if config.fusion.head == "zero_shot" and specs[:-1] and calibration is None:
        notes.append("exits: zero-shot confidence is not calibrated; thresholds set by hand promise nothing")
    preparations = {name: _preparation(encoder, prepared_by[name], fast) for name, encoder in encoders.items()}
    if without_exits:
        notes.append(f"exits: none, every sample is answered in full: {without_exits}")
    elif calibration is not None and not calibration.exits:
        notes.append("exits: none, every sample is answered in full: the calibration could certify none")
    return Built(
        graph,
        preparations,
        labels,
        gating.thresholds,
        removed,
        tuple(notes),
        core,
        shortened,
        temperatures=gating.temperatures,
        confidence=gating.confidence,
        max_disagreement=gating.max_disagreement,
        head=head,
        calibration=None if without_exits else calibration,
    )


def not_bound(config: Config, why: str) -> str:
    """What becomes of a calibration that doesn't hold: a ConfigError, or with `on_mismatch: full` the reason back."""
    if config.fusion.on_mismatch == "full":
        return f"{config.fusion.calibration} does not hold: {why}"
    hint = "run mmpipe calibrate again, or set fusion.on_mismatch: full to run without exits"
    raise config.error(KEY, f"{config.fusion.calibration} does not hold here: {why}", hint)


def _gating(config: Config, calibration: Calibration | None, without_exits: str) -> Gating:
    if without_exits or calibration is None:
        return by_hand(config, exits=not without_exits)
    return certified(calibration)


def pull_weights(
    config: Config, *, say: Callable[[str], None] = lambda text: None
) -> Iterator[tuple[str, str, list[str]]]:
    """Fetch what each encoder needs: (modality, model, files) as they arrive. Raises ConfigError."""
    for modality, settings in config.encoders.items():
        say(f"fetching {modality}: {settings.model}")
        with _as_config_error(config, f"encoders.{modality}.model"):
            options = dict(settings.options)
            files = pull(settings.model, modality, weights=settings.weights, options=options, base=config.source.folder)
        yield modality, settings.model, files


@contextmanager
def _as_config_error(config: Config, path: str) -> Iterator[None]:
    """A ground library's error → one that says which key of which file asked for it."""
    try:
        yield
    except MissingPackage as error:
        raise MissingExtraError(str(config.error(path, str(error)))) from error
    except EncoderError as error:
        at = path.removesuffix("model") + error.key if path.startswith("encoders.") else path
        raise config.error(at, str(error)) from error
    except HeadError as error:
        raise config.error(path, str(error)) from error
    except GraphError as error:
        raise ModelError(str(config.error(path, str(error)))) from error
    except MmpipeError:
        raise
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise ModelError(str(config.error(path, f"{type(error).__name__}: {error}"))) from error


def _notes(encoder: Encoder, fast: bool) -> tuple[str, ...]:
    notes = encoder.notes if isinstance(encoder, BuiltEncoder) else ()
    if fast and encoder.modality == "image" and _smallest_side(encoder, fast) is None:
        notes += ("input.decode: fast changes nothing: this encoder has no `smallest_side`",)
    return notes


def _smallest_side(encoder: Encoder, fast: bool) -> int | None:
    """Of pictures that may be scaled down; None: they are decoded exactly. Your own encoder may have one too."""
    return getattr(encoder, "smallest_side", None) if fast and encoder.modality == "image" else None


def _settings(encoder: Encoder, options: Mapping[str, Any], fast: bool) -> Mapping[str, Any]:
    """All that shapes prepare() and what it is given, as far as it can be told."""
    decoding = {} if (side := _smallest_side(encoder, fast)) is None else {"decode": "fast", "smallest_side": side}
    if isinstance(encoder, BuiltEncoder):
        return {**encoder.preprocessing, "files": _small_files(encoder.files), **decoding}
    name = f"{type(encoder).__module__}:{type(encoder).__qualname__}"
    own = getattr(encoder, "preprocessing", None)  # what its author says shapes prepare()
    return {"class": name, "options": dict(options), "source": source_digest(type(encoder)), "own": own, **decoding}


def _preparation(encoder: Encoder, settings: Mapping[str, Any], fast: bool) -> Preparation:
    heard = decoded = None
    if isinstance(encoder, BuiltEncoder):
        encoder.release()
        heard = encoder.max_seconds
        decoded = None if heard is None else heard + encoder.margin_seconds
    side = _smallest_side(encoder, fast)
    exactly: Callable[[Any], dict[str, Tensor]] = encoder.prepare
    if isinstance(encoder, BuiltEncoder) and isinstance(encoder.host, ResizeCrop):
        own = type(encoder).prepare is not BuiltEncoder.prepare
        exactly = encoder.prepare if own else Resized(encoder.host)
    return Preparation(
        encoder.modality,
        encoder.dim,
        exactly if side is None else getattr(encoder, "prepare_fast", exactly),
        max_seconds=heard,
        settings=settings,
        notes=_notes(encoder, fast),
        decoded_seconds=decoded,
        smallest_side=side,
        grey=isinstance(encoder, BuiltEncoder) and encoder.grey,
    )


def _small_files(names: Sequence[str]) -> dict[str, str]:
    """Configuration and tokeniser: file → hash. Weights are in the graph."""
    found = {}
    for path in map(Path, names):
        with contextlib.suppress(OSError):
            if path.suffix in _TEXTS and path.is_file():
                found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _checkpoint(config: Config) -> Checkpoint | None:
    if config.fusion.checkpoint is None:
        return None
    with _as_config_error(config, "fusion.checkpoint"):
        return read_checkpoint(config.resolve(config.fusion.checkpoint))


def _head(
    config: Config, encoders: Mapping[str, Encoder], dims: Mapping[str, int], checkpoint: Checkpoint | None
) -> nn.Module:
    kind = config.fusion.head
    if kind == "zero_shot":
        return _zero_shot(config, encoders)
    with _as_config_error(config, "fusion.checkpoint" if checkpoint else "fusion.head"):
        if ":" in kind:
            forget_others(kind.partition(":")[0], config.source.folder)
        return load_head(
            kind,
            dims,
            config.all_labels,
            checkpoint=checkpoint,
            options=config.fusion.options,
            base=config.source.folder,
        )


def _zero_shot(config: Config, encoders: Mapping[str, Encoder]) -> ZeroShotHead:
    """Encode every label in every prompt with the text tower that shares the encoder's space."""
    prototypes, scales, weights = {}, {}, {}
    by_name: dict[str, ModalityConfig] = {str(name): value for name, value in config.fusion.modalities.items()}
    for modality, encoder in encoders.items():
        path = f"fusion.modalities.{modality}.prompts"
        if not isinstance(encoder, BuiltEncoder) or encoder.prompts is None:
            raise config.error(
                "fusion.head",
                f"zero_shot can't compare labels with {modality}: its model has no text side",
                "use an encoder that has one (CLIP, CLAP, a sentence encoder), or head: linear with a checkpoint",
            )
        settings = by_name.get(modality)
        templates = settings.prompts if settings else ("{}",)
        texts = [template.replace("{}", label) for template in templates for label in config.all_labels]
        with _as_config_error(config, path), torch.inference_mode():
            encoded_PLD = known_prompts(encoder, texts).reshape(len(templates), len(config.all_labels), -1)
        prototypes[modality] = prompt_prototypes(encoded_PLD).clone()
        scales[modality] = settings.logit_scale if settings and settings.logit_scale else encoder.logit_scale
        weights[modality] = settings.weight if settings else 1.0
    return ZeroShotHead(prototypes, scales=scales, weights=weights)


def _exit_spec(
    config: Config, number: int, exit_: ExitConfig, encoders: Mapping[str, Encoder], checkpoint: Checkpoint | None
) -> ExitSpec:
    """`after` as the graph knows it: modalities, a depth of the head, or a probe on an encoder's layer."""
    place, _, layer = exit_.after[0].partition(".layer")
    if not layer:
        return ExitSpec(exit_.name, tuple(m for m in encoders if m in exit_.after))
    if place == HEAD:
        return ExitSpec(exit_.name, tuple(encoders), depth=int(layer))
    with _as_config_error(config, f"fusion.exits.{number}.after"):
        weight_LD, bias_L = probe(checkpoint, exit_.name, config.all_labels)
    return ExitSpec(exit_.name, (place,), probe=Probe(place, int(layer), weight_LD, bias_L, _mask(encoders[place])))


def _mask(encoder: Encoder) -> str | None:
    return encoder.mask if isinstance(encoder, BuiltEncoder) else None


def _states(config: Config, encoders: Mapping[str, Encoder]) -> list[PooledLayer]:
    """The layers of encoders that the configuration's exits stand after."""
    places = [exit_.name.partition(".layer") for exit_ in config.fusion.exits if len(exit_.after) == 1]
    return [PooledLayer(p, int(layer), _mask(encoders[p])) for p, _, layer in places if layer and p != HEAD]


__all__ = ["Built", "ConfigError", "Preparation", "build", "pull_weights"]
