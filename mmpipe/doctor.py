"""`mmpipe doctor`: what this machine has for mmpipe, what it lacks, and what to do about that."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch

from mmpipe import machine
from mmpipe.budget import shown
from mmpipe.cache import folder as cache_folder
from mmpipe.graphs.backends import kernels
from mmpipe.runtime.device import available_bytes, cuda_devices

# (module, its package, extra that brings it, what it is for); no extra: mmpipe itself needs it
_PACKAGES = (
    ("pyarrow", "pyarrow", "", "tables"),
    ("soundfile", "soundfile", "", "sounds"),
    ("soxr", "soxr", "", "resampling"),
    ("transformers", "transformers", "hf", "hf: models"),
    ("open_clip", "open_clip_torch", "open_clip", "open_clip: models"),
    ("torchvision", "torchvision", "open_clip", "open_clip: models"),
    ("av", "av", "av", "m4a, aac and other sounds"),
    ("onnxruntime", "onnxruntime", "onnx", "runtime.backend: onnx"),
    ("openvino", "openvino", "openvino", "runtime.backend: openvino"),
    ("tensorrt", "tensorrt", "tensorrt", "runtime.backend: tensorrt, on a GPU"),
    ("tensorrt_rtx", "tensorrt_rtx", "tensorrt_rtx", "runtime.backend: tensorrt, on an RTX GPU"),
)
_LITTLE_MEMORY, _LITTLE_DISK = 2_000_000_000, 1_000_000_000
_IMPORT = """
import importlib, json, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
        why = ""
    except Exception as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
    print(json.dumps([name, why]), flush=True)
"""
_MARKS = {"has": "✓", "without": "–", "lacks": "!"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `state`: has · without (nothing is wrong, something is slower or not to be had) ·
    lacks (something will fail)."""

    about: str
    state: str
    told: str


def look() -> Iterator[Finding]:
    """All of it, in order. Imports what is installed, in another process: seconds."""
    yield _processor()
    yield _memory()
    yield _gpu()
    yield _compiler()
    if why := kernels.why_not():
        yield Finding("native code", "without", f"{why}: PyTorch's own operations are used")
    else:
        yield Finding("native code", "has", ", ".join(kernels.sources()))
    yield _cache(cache_folder())
    yield _hub()
    there = [module for module, *_ in _PACKAGES if util.find_spec(module) is not None]
    broken = _broken(there)
    for module, package, extra, use in _PACKAGES:
        yield _package(package, extra, use, installed=module in there, broken=broken.get(module, ""))


def table(found: Sequence[Finding]) -> Iterator[str]:
    """Lines for a terminal."""
    width = max(len(one.about) for one in found)
    for one in found:
        yield f"{_MARKS[one.state]} {one.about:<{width}}  {one.told}"


def plain(found: Sequence[Finding]) -> list[dict[str, Any]]:
    """For --json."""
    return [asdict(one) for one in found]


def _processor() -> Finding:
    kind, instructions, model, *_ = machine.processor()
    gain = machine.bfloat16_gain()
    types = f"a product in bfloat16 takes {1 / gain:.2f} of float32's time" if gain else "no bfloat16: float32 is used"
    return Finding("processor", "has", f"{model or kind}, {machine.cores()} cores, {instructions}; {types}")


def _memory() -> Finding:
    available = available_bytes()
    state = "lacks" if available < _LITTLE_MEMORY else "has"
    return Finding("memory", state, f"{shown(available)} are available; runtime.memory_limit takes 80% of that")


def _gpu() -> Finding:
    count = cuda_devices()
    if count:
        names = [torch.cuda.get_device_name(number) for number in range(count)]
        return Finding("GPU", "has", f"{', '.join(names)}; CUDA {torch.version.cuda}")
    if Path("/dev/nvidia0").exists():
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        return Finding("GPU", "lacks", f"there is one, and PyTorch (built {built}) does not see it: update its driver")
    return Finding("GPU", "without", "none that PyTorch sees: everything runs on the processor")


def _compiler() -> Finding:
    compiler = os.environ.get("CXX", "g++")
    path = shutil.which(compiler) or shutil.which("clang++")
    if path is None:
        lost = "runtime.backend inductor and native can't compile, and Pillow resizes pictures"
        return Finding("C++ compiler", "without", f"no {compiler}: {lost}")
    return Finding("C++ compiler", "has", path)


def _cache(folder: Path | None) -> Finding:
    if folder is None:
        return Finding("cache", "without", "MMPIPE_CACHE is off: every start captures, every run encodes anew")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return Finding("cache", "lacks", f"{folder} can't be written to: {error.strerror}; MMPIPE_CACHE names another")
    used = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            used += path.lstat().st_size
    state = "lacks" if free < _LITTLE_DISK else "has"
    return Finding("cache", state, f"{folder}: {shown(used)}, {shown(free)} of its disk are free")


def _hub() -> Finding:
    home = os.environ.get("HF_HOME") or str(Path.home() / ".cache" / "huggingface")
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    token = bool(os.environ.get("HF_TOKEN")) or Path(home, "token").is_file()
    told = "offline: only models that are there" if offline else "models that are not there are fetched"
    return Finding("hub", "has", f"{home}; {told}; {'a' if token else 'no'} token")


def _package(package: str, extra: str, use: str, *, installed: bool, broken: str) -> Finding:
    remedy = f"pip install 'mmpipe[{extra}]'" if extra else f"pip install --force-reinstall {package}"
    if not installed:
        return Finding(package, "without" if extra else "lacks", f"not installed, for {use}: {remedy}")
    if broken:
        return Finding(package, "lacks", f"installed, but can't be imported ({broken}): {remedy}")
    return Finding(package, "has", f"{_version(package)}, for {use}")


def _broken(modules: Sequence[str]) -> dict[str, str]:
    """Module → why it can't be imported. A broken installation shows only then, and may end the process."""
    broken: dict[str, str] = {}
    rest = list(modules)
    while rest:
        command = [sys.executable, "-P", "-W", "ignore", "-c", _IMPORT, *rest]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
        for line in done.stdout.splitlines():
            with contextlib.suppress(ValueError, TypeError):
                name, why = json.loads(line)
                if name in rest:
                    rest.remove(name)
                    broken |= {name: why} if why else {}
        if rest:
            broken[rest.pop(0)] = f"its import ends the process, code {done.returncode}"
    return broken


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "of its own"
