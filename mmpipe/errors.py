"""Everything mmpipe raises on purpose.

    MmpipeError                 exit code 1
    ├── ConfigError             2   the YAML, a --set, a model id: file, line, path, value, remedy
    ├── InputError              2   the folder or manifest: nothing there, ambiguous pairs, bad columns
    ├── MissingExtraError       2   a package that an option needs is not installed
    ├── ModelError              2   weights missing or of the wrong shape; a module that can't be captured
    ├── OutputError             4   the output is locked, or not ours to write over
    ├── Interrupted             130 or 143
    └── MediaError              -   one file; becomes a row with a reason, never ends a job

The ground libraries (graphs, encoders, fusion) raise errors of their own; `mmpipe.pipeline` wraps them here, once.
"""

from __future__ import annotations

from typing import Any


class MmpipeError(Exception):
    """Base of all. `exit_code` is what the command line ends with."""

    exit_code = 1

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process can make it again, whatever a class takes to be made of."""
        return _again, (type(self), self.args, self.__dict__)


def _again(kind: type[MmpipeError], args: tuple[Any, ...], about: dict[str, Any]) -> MmpipeError:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(about)
    return error


class ConfigError(MmpipeError):
    """A configuration that can't be used.

    `where` is "file:line" (or the file, or "--set"); `path` the dotted key; `hint` the way out.
    """

    exit_code = 2

    def __init__(self, message: str, *, where: str = "", path: str = "", hint: str = "") -> None:
        self.message, self.where, self.path, self.hint = message, where, path, hint
        super().__init__(message)

    def __str__(self) -> str:
        head = ": ".join(part for part in (self.where, self.path, self.message) if part)
        return f"{head}\n  {self.hint}" if self.hint else head


class InputError(MmpipeError):
    """The input folder or manifest as a whole can't be used."""

    exit_code = 2


class MissingExtraError(MmpipeError):
    """A package is missing; the message names the extra that brings it."""

    exit_code = 2


class ModelError(MmpipeError):
    """A model can't be found, loaded or captured."""

    exit_code = 2


class OutputError(MmpipeError):
    """The output folder is in use, or holds what this run must not touch."""

    exit_code = 4


class Interrupted(MmpipeError):
    """Ctrl-C (130) or SIGTERM (143); what was committed stays committed."""

    def __init__(self, signal_number: int) -> None:
        self.exit_code = 128 + signal_number
        super().__init__(f"interrupted by signal {signal_number}")


class MediaError(MmpipeError):
    """One medium of one sample can't be used.

    `code` is a stable short word (`truncated`, `empty`, `not_found`, `too_large`, …); `text` is for people and
    holds no absolute path. In a row it reads `modality:code: text`.
    """

    def __init__(self, modality: str, code: str, text: str) -> None:
        self.modality, self.code, self.text = modality, code, text
        super().__init__(f"{modality}:{code}: {text}")

    def alone(self) -> MediaError:
        """This, without where it was raised and why: kept with its row, it would keep those calls and all that they
        had in hand, the bytes of the broken file as well."""
        self.__traceback__ = self.__cause__ = self.__context__ = None
        return self
