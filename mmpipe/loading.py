"""Importing torch, building a pipeline, running it and ending, without the collector or malloc in the way."""

from __future__ import annotations

import _thread
import atexit
import contextlib
import ctypes
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


@contextmanager
def collector_paused() -> Iterator[None]:
    """No cyclic collection inside: loading makes millions of objects that stay, and looking through them again and
    again takes a fifth of the time to the first result."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def collector_spared() -> Iterator[None]:
    """What is there before is not looked through inside: a job makes objects for every item, and the collector that
    they wake would walk through all that torch and the models have made, with every thread waiting for it. Left as it
    is where the process has frozen objects of its own: they could not be told from these."""
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def end(code: int) -> NoReturn:
    """End the process, which is the caller's own, with this exit code: other threads and what is registered with atexit
    first, as ever, but without taking down a thousand modules and hundreds of megabytes of libraries: 0.2 s, and 130 MB
    of pages that nothing had touched before."""
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    except (Exception, KeyboardInterrupt):  # noqa: BLE001 - the interpreter tells of it: a closed pipe, say
        sys.exit(code)
    os._exit(code)


def use_huge_pages() -> None:
    """Before torch is imported: let it ask for pages of 2 MB, where the system leaves that to programs. Passing over
    activations of a large encoder looks up half a million small ones: a tenth of a folder's time."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def heed_interrupts() -> None:
    """Ctrl-C and SIGTERM that come while Python runs a finaliser or a weak reference's callback are printed and dropped
    there: they are given again, once it is done."""
    before = sys.unraisablehook

    def again(about: sys.UnraisableHookArgs) -> None:
        error = about.exc_value
        number = signal.SIGINT if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 0) - 128
        if number in (signal.SIGINT, signal.SIGTERM):
            threading.Timer(_AGAIN_S, _thread.interrupt_main, [number]).start()
        else:
            before(about)

    sys.unraisablehook = again


_AGAIN_S = 0.02
_KEPT_BYTES = 2_000_000_000  # freed memory that stays with the process
_KEEPS: list[bool] = []
_GIVE_BACK_S = 20.0  # it takes up to 15 ms, and as much again to have the memory back


def keep_freed_memory(size_bytes: int = _KEPT_BYTES) -> bool:
    """Tell glibc to keep what is freed instead of giving large blocks back and faulting them in again at every bucket.

    It is the whole process's matter, so that only the command line does it, which owns its process: a third of the
    time of CLAP in float32, an eighth of the demo's. False where the C library is another.
    """
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        trim_threshold, mmap_threshold = -1, -3  # glibc's M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        if all(libc.mallopt(option, size_bytes) == 1 for option in (trim_threshold, mmap_threshold)):
            _KEEPS.append(True)
    return freed_memory_is_kept()


def give_back_freed_memory() -> None:
    """After loading: checkpoints, towers that are not used and what capture left behind, a few hundred MB."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


class GivingBack:
    """In a long run: give back now and then what is free and kept. Large photos come by chance, and what they took adds
    up in pieces that nothing else fits into: 90 MB in two processes after 7,000 photos."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self) -> None:
        if freed_memory_is_kept() and time.monotonic() - self._last >= _GIVE_BACK_S:
            give_back_freed_memory()
            self._last = time.monotonic()


def freed_memory_is_kept() -> bool:
    return bool(_KEEPS)
