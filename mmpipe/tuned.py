"""What was measured, kept for this machine: by `mmpipe autotune`, segment, bucket and threads → the fastest way, with
its figures; by long jobs, encoder that is too small for a rule → the number type that it is faster in.

One JSON file for each combination of processor and library versions: what was measured with others says nothing.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import fx

from mmpipe.cache import folder as cache_folder
from mmpipe.graphs.backends import BACKENDS, OPERATION_BY_OPERATION
from mmpipe.graphs.digest import digest
from mmpipe.machine import hardware
from mmpipe.resolved import Choice

DTYPES = ("float32", "bfloat16")
_PARTS = ("segments", "types")
WON_BACK = 2.0  # a compiler is waited for where it saves this many times what it takes


@dataclass(frozen=True)
class Best:
    """The fastest way of a segment. Times in seconds; a row's in a full bucket, alone on the machine."""

    choice: Choice
    row_seconds: float
    plain_row_seconds: float  # of the best way that needs no compiler
    plain: Choice
    ready_seconds: float  # to have it again, from what is kept of its compilation

    def pays(self, job_rows: int) -> bool:
        """Whether a job of so many rows wins back what getting ready takes."""
        return self.choice.backend in OPERATION_BY_OPERATION or job_rows >= self.pays_from

    @property
    def pays_from(self) -> int:
        """Rows that win back what getting ready takes."""
        saved = self.plain_row_seconds - self.row_seconds
        return math.ceil(WON_BACK * self.ready_seconds / saved - 1e-9) if saved > 0 else sys.maxsize

    @property
    def told(self) -> str:
        chosen, plain = (f"{way.backend} {way.dtype}" for way in (self.choice, self.plain))
        if chosen == plain:
            return f"{chosen}, the fastest that was tried"
        return f"{chosen}, {self.plain_row_seconds / self.row_seconds:.2f} × as fast as {plain}"

    def not_yet(self, job_rows: int) -> str:
        saved = job_rows * (self.plain_row_seconds - self.row_seconds)
        return (
            f"not {self.choice.backend}: {job_rows} rows would save {saved:.1f} s, "
            f"and getting ready takes {self.ready_seconds:.1f} s"
        )


class Tuned:
    """The winners that are known here. A file that is broken, or of another version, counts as none."""

    def __init__(self, folder: Path | None = None) -> None:
        root = cache_folder() if folder is None else folder
        self._path = None if root is None else root / "tuned" / f"{hardware()}.json"
        self._digests: dict[int, tuple[fx.GraphModule, str]] = {}

    @cached_property
    def entries(self) -> dict[str, Any]:
        return self._read()["segments"]

    @cached_property
    def types(self) -> dict[str, Any]:
        return self._read()["types"]

    def best(self, module: fx.GraphModule, rows: int, threads: int) -> Best | None:
        """For a segment by what it computes, whatever it is called."""
        if not self.entries:  # hashing the weights takes a while
            return None
        entry = self.entries.get(self._key(module, rows, threads))
        try:
            return None if entry is None else _best(entry)
        except (KeyError, TypeError, ValueError):
            return None

    def keep(self, found: Iterable[tuple[fx.GraphModule, int, int, Best]]) -> Path | None:
        """Write winners: (segment, rows, threads, best). None where nothing may be kept. Raises OSError."""
        new = {self._key(module, rows, threads): asdict(best) for module, rows, threads, best in found}
        self.entries.update(new)
        return self._write("segments", new)

    def dtype(self, module: fx.GraphModule) -> str | None:
        """The number type that a segment is faster in; None: nobody measured."""
        if not self.types:
            return None
        found = self.types.get(self._digest(module))
        return found if found in DTYPES else None

    def keep_dtypes(self, found: Iterable[tuple[fx.GraphModule, str]]) -> Path | None:
        """Write types, as `keep`; this object knows them in any case."""
        new = {self._digest(module): dtype for module, dtype in found}
        self.types.update(new)
        return self._write("types", new)

    def _read(self) -> dict[str, dict[str, Any]]:
        parts: dict[str, dict[str, Any]] = {part: {} for part in _PARTS}
        if self._path is not None:
            with contextlib.suppress(OSError, ValueError):
                found = json.loads(self._path.read_text(encoding="utf-8"))
                if isinstance(found, dict) and found.get("version") == 1:
                    parts |= {part: found[part] for part in _PARTS if isinstance(found.get(part), dict)}
        return parts

    def _write(self, part: str, new: Mapping[str, Any]) -> Path | None:
        """With what others have written meanwhile."""
        if self._path is None:
            return None
        found = self._read()
        found[part].update(new)
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        half = self._path.with_suffix(f".{os.getpid()}")
        half.write_text(json.dumps({"version": 1, **found}, indent=1), encoding="utf-8")
        os.replace(half, self._path)
        return self._path

    def _key(self, module: fx.GraphModule, rows: int, threads: int) -> str:
        return f"{self._digest(module)}:{rows}:{threads}"

    def _digest(self, module: fx.GraphModule) -> str:
        if id(module) not in self._digests:
            self._digests[id(module)] = module, digest(module).hex()
        return self._digests[id(module)][1][:32]


def _best(entry: Mapping[str, Any]) -> Best:
    """Raises KeyError, TypeError or ValueError for what `keep` did not write."""
    numbers = {name: float(entry[name]) for name in ("row_seconds", "plain_row_seconds", "ready_seconds")}
    if not all(0 < value < math.inf for value in (numbers["row_seconds"], numbers["plain_row_seconds"])):
        raise ValueError("a row takes some time")
    if not 0 <= numbers["ready_seconds"] < math.inf:
        raise ValueError("getting ready takes some time")
    choice, plain = (Choice(entry[name]["backend"], entry[name]["dtype"]) for name in ("choice", "plain"))
    if any(one.backend not in BACKENDS or one.dtype not in DTYPES for one in (choice, plain)):
        raise ValueError("no such backend or number type")
    return Best(choice, plain=plain, **numbers)


def compiled_folder() -> Path | None:
    """Where compiled code is kept; None: nowhere."""
    where = cache_folder()
    return None if where is None else where / "compiled"
