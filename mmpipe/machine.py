"""This machine: its processor, its libraries, and what number types it multiplies."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import time
from importlib import metadata
from pathlib import Path

import torch

_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # a container's: microseconds of a core in so many
_PACKAGES = (
    *("mmpipe", "torch", "torchvision", "torchaudio", "transformers", "tokenizers", "open_clip_torch", "timm"),
    *("safetensors", "sentencepiece", "ftfy", "regex", "numpy", "pillow", "soundfile", "soxr", "av"),
    *("openvino", "onnxruntime", "onnx", "tensorrt", "tensorrt_rtx"),
)


def versions() -> dict[str, str]:
    """Versions of Python, of mmpipe, and of the packages that shape results, where they are installed."""
    return dict(_versions())


@functools.cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def cores() -> int:
    """That this process may use: a container's share may be less than the processor has."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = _QUOTA.read_text(encoding="ascii").split()
        found = min(found, max(1, round(int(quota) / int(period))))  # "max": no limit
    return found


@functools.cache
def processor() -> list[str]:
    """What libraries choose their code by: kind of processor, its features, and variables that hide some of them."""
    about = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").split("\n\n")[0].splitlines():
            name, _, value = line.partition(":")
            about[name.strip()] = value.strip()
    names = ("model name", "flags", "Features", "cache size")
    variables = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR", "ATEN_CPU_CAPABILITY")
    return [
        platform.machine(),
        torch.backends.cpu.get_cpu_capability(),
        *(about.get(name, "") for name in names),
        *(os.environ.get(name, "") for name in variables),
    ]


@functools.cache
def hardware() -> str:
    """Processor, cores and libraries, as a hash: what a measurement of speed holds for."""
    about = json.dumps([processor(), os.cpu_count(), versions()], sort_keys=True)
    return hashlib.sha256(about.encode()).hexdigest()[:32]


@functools.cache
def bfloat16_gain() -> float:
    """How many times faster than float32 a large matrix product is in bfloat16; 0: the processor has no instruction for
    it, and the library would take it apart (up to 500 times slower)."""
    if not _has_bfloat16():
        return 0.0
    seconds = {}
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            one, other = torch.randn(512, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
            times = []
            for _ in range(6):
                began = time.perf_counter()
                torch.mm(one, other)
                times.append(time.perf_counter() - began)
            seconds[dtype] = min(times[1:])
    return seconds[torch.float32] / seconds[torch.bfloat16]


def _has_bfloat16() -> bool:
    """Whether oneDNN may use this processor's own bfloat16 instructions."""
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()
    if allowed and not any(word in allowed for word in ("BF16", "FP16", "AMX", "ALL", "DEFAULT")):
        return False
    if torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
