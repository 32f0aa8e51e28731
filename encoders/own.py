"""An encoder class of the user's own: package.module:Class, importable, or in a file beside the configuration."""

from __future__ import annotations

import hashlib
import importlib
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from mmpipe.encoders.base import Encoder, EncoderError

NEEDED = ("modality", "dim", "prepare", "module")


def load_own(name: str, modality: str, options: dict[str, Any], base: Path) -> Encoder:
    """Class(**options), checked to be an `Encoder` of `modality`; its module is put into evaluation mode.

    Raises EncoderError; where the user's code failed it names the file, the line and the original error.
    """
    module_name, _, class_name = name.partition(":")
    module = _import(module_name, name, base)
    if (cls := getattr(module, class_name, None)) is None:
        raise EncoderError(f"{name}: {module.__file__} has no '{class_name}'")
    try:
        encoder: Encoder = cls(**options)
    except Exception as error:
        raise EncoderError(f"{name}: {class_name}({_written(options)}) failed: {_place(error)}") from error
    if missing := [part for part in NEEDED if not hasattr(encoder, part)]:
        raise EncoderError(f"{name}: the object lacks {', '.join(missing)}; an encoder has {', '.join(NEEDED)}")
    if encoder.modality != modality:
        raise EncoderError(f"{name} is an encoder for '{encoder.modality}', not for '{modality}'")
    if not isinstance(encoder.module, nn.Module):
        raise EncoderError(f"{name}: its 'module' is a {type(encoder.module).__name__}, not a torch.nn.Module")
    encoder.module.eval().requires_grad_(False)
    return encoder


def source_digest(cls: type) -> str:
    """A hash of the code that a class stands in: of every Python file of its package, or of its file's folder, so that
    a helper that it imports from beside itself counts too."""
    total = hashlib.sha256()
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    top = sys.modules.get(cls.__module__.partition(".")[0])
    package = getattr(top, "__path__", None)
    paths = [path for folder in package for path in Path(folder).rglob("*.py")] if package is not None else []
    if not paths and file is not None:
        paths = list(Path(file).parent.glob("*.py"))
    for path in sorted(paths):
        total.update(path.name.encode() + b"\0" + path.read_bytes())
    return total.hexdigest()


def _import(module_name: str, name: str, base: Path) -> ModuleType:
    forget_others(module_name, base)
    sys.path.insert(0, str(base))
    importlib.invalidate_caches()  # the file may be younger than the folder's cached listing
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise EncoderError(f"{name}: no module '{error.name}', neither installed nor in {base}") from error
        raise EncoderError(f"{name}: importing '{module_name}' failed: {_place(error)}") from error
    except Exception as error:
        raise EncoderError(f"{name}: importing '{module_name}' failed: {_place(error)}") from error
    finally:
        sys.path.remove(str(base))


def forget_others(module_name: str, base: Path) -> None:
    """A module of the same name that came from another folder must not stand in for the one in `base`; nor may one that
    it imports from beside itself, unless that is where Python itself would find it."""
    top = module_name.partition(".")[0]
    for name in [name for name in sys.modules if "." not in name]:
        here = next((path for path in (base / name / "__init__.py", base / f"{name}.py") if path.is_file()), None)
        file = getattr(sys.modules[name], "__file__", None)
        if here is None or file is None or Path(file).absolute() == here.absolute():
            continue
        if name == top or _where_python_finds(name) != file:
            for known in [known for known in sys.modules if known == name or known.startswith(f"{name}.")]:
                del sys.modules[known]


def _where_python_finds(name: str) -> str | None:
    """The file that a module would be imported from if it were not there yet: finders of editable installs know some,
    too."""
    if name == "__main__":  # nobody imports it
        return getattr(sys.modules[name], "__file__", None)
    specs = (finder.find_spec(name, None) for finder in sys.meta_path)
    return next((spec.origin for spec in specs if spec is not None), None)


def _place(error: BaseException) -> str:
    """ "file:line: Type: message" of where the user's own code went wrong."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}: {type(error).__name__}: {error.msg}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    where = f"{frames[-1].filename}:{frames[-1].lineno}: " if len(frames) > 1 else ""
    return f"{where}{type(error).__name__}: {error}"


def _written(options: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in options.items())
