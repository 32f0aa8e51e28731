"""What of a module decides the graph that is captured of it: its parts and their settings, not its weights."""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmpipe.graphs import recapture

# whose code or version is part of the name; a module with a part of another's is captured every time
_KNOWN = (
    *("mmpipe.encoders", "mmpipe.fusion", "mmpipe.graphs", "mmpipe.capturing"),
    *("torch", "torchvision", "torchaudio", "transformers", "open_clip", "timm"),
)


def architecture(module: nn.Module) -> str | None:
    """A hash of all that a module tells of itself but the numbers in its weights; None where a part is not known."""
    parts = []
    for path, part in module.named_modules():
        kind = type(part)
        if not any(kind.__module__ == known or kind.__module__.startswith(f"{known}.") for known in _KNOWN):
            return None
        try:
            settings = _plain({name: value for name, value in vars(part).items() if name not in _BASE})
        except _Unknown:
            return None
        parts.append([path, _name(kind), part.extra_repr(), settings])
    alike = recapture.aliases(module)
    tensors = [*module.named_parameters(), *module.named_buffers()]
    told = [parts, [[name, alike[name], list(t.shape), t.stride(), str(t.dtype)] for name, t in tensors]]
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


_BASE = frozenset(vars(nn.Module()))


class _Unknown(Exception):
    """An attribute that can't be told from another."""


def _plain(value: Any) -> Any:
    """An attribute as JSON: settings as they are, functions and objects by their names. Raises _Unknown."""
    if isinstance(value, enum.Enum):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, set | frozenset):  # in no order of its own
        return sorted(map(str, map(_plain, value)))
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, torch.dtype | torch.device | np.generic):
        return str(value)
    if isinstance(value, Tensor | np.ndarray):
        return [str(value.dtype), torch.as_tensor(value).tolist()]
    if isinstance(value, functools.partial):
        return [_plain(value.func), _plain(value.args), _plain(value.keywords)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [
            _name(type(value)),
            _plain({field.name: getattr(value, field.name) for field in dataclasses.fields(value)}),
        ]
    if callable(getattr(value, "to_dict", None)):  # a configuration of transformers'
        return _plain(value.to_dict())
    name = _name(value if callable(value) and hasattr(value, "__qualname__") else type(value))
    if "<" in name:  # a lambda, or a function inside another
        raise _Unknown(name)
    return name


def _name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"
