"""One medium → one row of its encoder's inputs: opened, decoded, prepared."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mmpipe import media
from mmpipe.build import Preparation
from mmpipe.errors import MediaError, MmpipeError

_MOST_TOLD = 500  # characters
_FOLDERS = re.compile(r"(?<![\w.:/~])/(?:[^\s/'\"]+/)+")  # before the name of a file: rows travel, and hold no folders


def prepared(
    branch: str,
    source: Any,
    preparation: Preparation,
    limits: media.Limits,
    reserve: Callable[[int], None] = lambda count: None,
) -> Mapping[str, Tensor]:
    """Raises MediaError where the medium can't be used, whatever a user's own `prepare` raises included."""
    medium = media.load(
        branch,
        source,
        limits=limits,
        max_seconds=preparation.decoded_seconds,
        smallest_side=preparation.smallest_side,
        grey=preparation.grey,
        reserve=reserve,
    )
    try:
        with torch.inference_mode():
            return preparation.prepare(medium)
    except MmpipeError:
        raise
    except (Exception, SystemExit) as error:  # a user's own code may raise anything; one sample must not end a job
        told = _FOLDERS.sub("", f"{type(error).__name__}: {error}")  # some quote all that they were given
        raise MediaError(branch, "unusable", told if len(told) <= _MOST_TOLD else told[:_MOST_TOLD] + " …") from error
