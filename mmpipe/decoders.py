"""Decoding in processes of their own: where many threads decode, they wait for Python's lock more than for a core.

    a thread of media.Ahead ─► Decoder ═ socket ═► its process: opens, decodes, prepares
                 media slot ◄─ the thread ◄═ memory that both see ═╝

A process takes seconds to start; until it is there, the thread decodes by itself. A process that ends on a medium, in a
decoder's crash, say, takes that medium's row with it and nothing else. Rows are the same either way, to the bit.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmpipe import media, resizing
from mmpipe.build import Preparation
from mmpipe.errors import MediaError, MmpipeError

MEMORY_BYTES = 400_000_000  # of one process: Python, torch, a tokeniser
_KEPT_BYTES = 64_000_000  # of what a process has freed that stays with it
_LARGEST_BYTES = 64_000_000  # of what prepares one branch, as bytes: what holds a model's weights stays here
_LOOK_S = 0.05  # between two looks whether a process is there
_END_S = 5.0  # for a process to be gone after its socket was closed
_ALIGNED = 64  # bytes
# No look at the current folder, which may hold a package of the same name.
_START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); import mmpipe.decoders as d; d.serve({}, {}, {})"

Put = Callable[[Mapping[str, Tensor]], None]
Spent = Callable[[float], None]  # seconds of a core
Layout = Sequence[tuple[str, torch.dtype, tuple[int, ...], int]]  # name, type, shape, where its bytes begin


def available() -> bool:
    """Whether this system has what is needed: memory without a name that two processes see."""
    return hasattr(os, "memfd_create") and bool(sys.executable)


class Decoders:
    """`count` processes that decode for threads of this one. `close` them. `patient`: a thread waits for one rather
    than decode by itself.

    `note`: why some media are decoded here after all; "" where none is.
    """

    def __init__(
        self, preparations: Mapping[str, Preparation], limits: media.Limits, count: int, *, patient: bool = False
    ) -> None:
        self._patient = patient
        self.note = ""
        self._lock = threading.Lock()
        self._looked = 0.0
        self._coming: list[Decoder] = []
        self._free: deque[Decoder] = deque()
        self._all: set[Decoder] = set()
        self._closed = False
        self._branches, content = self._pickled(preparations, limits)
        self._beside = sorted({folder for one in preparations.values() for folder in _folder_of(one.prepare)})
        self._content_fd = os.memfd_create("mmpipe-preparations")
        self._shut = weakref.finalize(self, os.close, self._content_fd)
        with os.fdopen(os.dup(self._content_fd), "wb") as file:
            file.write(content)
        for _ in range(count if self._branches else 0):
            self._start()

    def decode(self, branch: str, source: Any, put: Put, spent: Spent = lambda seconds: None) -> bool:
        """Hand a medium to a process; `put` gets its tensors, which are gone when it returns. False: the caller has to
        decode it.

        Raises MediaError.
        """
        if branch not in self._branches:
            return False
        plain = _sent(branch, source)
        decoder = None if plain is None else self._next() or (self._wait() if self._patient else None)
        if decoder is None:
            return False
        why = self._asked(decoder, branch, plain, put, spent)
        if why:  # it ended on this medium, or something ended it: once more
            decoder = self._wait()
            if decoder is None:
                return False
            why = self._asked(decoder, branch, plain, put, spent)
        if why:
            raise MediaError(branch, "corrupt", f"{media.label(branch, source)}the decoder {why} on it")
        return True

    def close(self) -> None:
        with self._lock:
            self._closed = True
            decoders, self._all = self._all, set()
            starting, self._coming = self._coming, []
            self._free.clear()
        for decoder in starting:
            decoder.kill()  # it would look at its socket only after seconds of imports
        for decoder in decoders:
            decoder.close()
        for decoder in decoders:
            decoder.ended()
        self._shut()

    def _asked(self, decoder: Decoder, branch: str, source: Any, put: Put, spent: Spent) -> str:
        """How the process ended, where it did."""
        try:
            decoder.decode(branch, source, put, spent)
        except (EOFError, OSError):
            why = decoder.ended()
            with self._lock:
                self._all.discard(decoder)
            self._start()
            return why
        except BaseException:
            self._free.append(decoder)
            raise
        self._free.append(decoder)
        return ""

    def _start(self) -> None:
        if self._closed:
            return
        try:
            decoder = Decoder(self._content_fd, self._beside)
        except OSError as error:
            self.note = f"media are decoded by threads: a process can't be started: {error}"
            return
        with self._lock:
            if self._closed:  # meanwhile
                decoder.close()
                return
            self._all.add(decoder)
            self._coming.append(decoder)

    def _next(self) -> Decoder | None:
        if self._coming and time.monotonic() - self._looked >= _LOOK_S:
            with self._lock:
                self._look()
        with contextlib.suppress(IndexError):
            return self._free.popleft()
        return None

    def _wait(self) -> Decoder | None:
        """One that is free, or will be; None: there is none any more."""
        while self._all and not self._closed:
            decoder = self._next()
            if decoder is not None:
                return decoder
            time.sleep(_LOOK_S)
        return None

    def _look(self) -> None:
        """Which of those that were started are there by now, and what they can't prepare."""
        self._looked = time.monotonic()
        for decoder in list(self._coming):
            answer = decoder.answer()
            if answer is None:
                continue
            self._coming.remove(decoder)
            for branch, why in answer.items():
                self.note = f"{branch or 'media'}: decoded by threads: a process could not: {why}"
            self._branches -= answer.keys()
            if "" in answer or not self._branches:
                self._all.discard(decoder)
                decoder.ended()
            else:
                self._free.append(decoder)

    def _pickled(self, preparations: Mapping[str, Preparation], limits: media.Limits) -> tuple[frozenset[str], bytes]:
        found: dict[str, bytes] = {}
        for branch, preparation in preparations.items():
            try:
                content = pickle.dumps(preparation)
            except Exception as error:  # noqa: BLE001 - a user's own code: whatever it holds that can't be sent
                self.note = f"{branch} is decoded by threads: its prepare() can't be sent to a process: {error}"
                continue
            if len(content) > _LARGEST_BYTES:
                self.note = f"{branch} is decoded by threads: its prepare() is {len(content) / 1e6:.0f} MB large"
            else:
                found[branch] = content
        return frozenset(found), pickle.dumps((found, limits, resizing.content()))


class Decoder:
    """One process, and this side of it. One thread at a time. What goes wrong with it is EOFError or OSError.

    `content_fd`: a file that says what it prepares. `beside`: where a user's own code is. Raises OSError where it can't
    be started.
    """

    def __init__(self, content_fd: int, beside: Sequence[str] = ()) -> None:
        ours, theirs = socket.socketpair()
        self._memory_fd = os.memfd_create("mmpipe-decoder")
        self._shut = weakref.finalize(self, os.close, self._memory_fd)
        self._memory: Tensor | None = None
        with theirs:
            fds = theirs.fileno(), self._memory_fd, content_fd
            # one thread each, as the threads of Ahead; and no context on a GPU
            alone = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
            folders = json.dumps([entry for entry in (*sys.path, *beside) if isinstance(entry, str)])
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-W", "ignore", "-c", _START.format(*fds), folders],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=fds,
                env={**os.environ, **alone},
                process_group=0,  # Ctrl-C is this process' matter, which then closes the socket
            )
        self._pipe = Connection(ours.detach())

    def answer(self) -> Mapping[str, str] | None:
        """None: not there yet. Else it can begin, but for these branches, and why; for "": not at all."""
        try:
            found: Mapping[str, str] | None = self._pipe.recv() if self._pipe.poll(0) else None
            return found
        except (EOFError, OSError):
            return {"": f"it {self.ended()}"}

    def decode(self, branch: str, source: Any, put: Put, spent: Spent) -> None:
        self._pipe.send((branch, source))
        kind, given, size, seconds = self._pipe.recv()
        spent(float(seconds))
        if kind == "medium":
            raise MediaError(*given)
        if kind == "error":
            raise MmpipeError(given)
        put(self._tensors(given, size))

    def close(self) -> None:
        """When its socket is closed it ends by itself."""
        self._pipe.close()

    def kill(self) -> None:
        self._process.kill()

    def ended(self) -> str:
        """Wait for its end, and end it if it doesn't; how it ended, for people."""
        self.close()
        try:
            code = self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._shut()
        return f"crashed (signal {-code})" if code < 0 else f"ended (code {code})"

    def _tensors(self, layout: Layout, size: int) -> dict[str, Tensor]:
        if self._memory is None or len(self._memory) < size:
            self._memory = _shared(self._memory_fd, size)
        return _views(self._memory, layout)


# --- the process ------------------------------------------------------------------------------------------------------


def serve(socket_fd: int, memory_fd: int, content_fd: int) -> None:
    """What a decoder's process does: media in, tensors out, until the socket is closed."""
    from mmpipe.loading import keep_freed_memory

    keep_freed_memory(_KEPT_BYTES)
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, OSError):  # the parent has closed it, or is no more
        content = os.pread(content_fd, os.fstat(content_fd).st_size, 0)  # others read it too: it has one position
        _answer(Connection(socket_fd), _Arena(memory_fd), content)
    os._exit(0)  # nothing is left to do, and what Python would tidy up takes a second


def _answer(pipe: Connection, arena: _Arena, content: bytes) -> None:
    from mmpipe.preparing import prepared

    contents, limits, resizes = pickle.loads(content)
    preparations, missing = {}, {}
    for branch, one in contents.items():
        try:
            preparations[branch] = pickle.loads(one)
        except Exception as error:  # noqa: BLE001 - a user's own code, which may not be found here
            missing[branch] = f"{type(error).__name__}: {error}"
    if resizes:
        resizing.adopt(lambda: bytes(resizes))
    pipe.send(missing)
    while True:
        branch, source = pipe.recv()
        began = time.process_time()
        try:
            found = prepared(branch, source, preparations[branch], limits)
            answer: tuple[str, Any, int] = ("row", arena.put(found), arena.size)
        except MediaError as error:
            answer = ("medium", (error.modality, error.code, error.text), 0)
        except Exception as error:  # noqa: BLE001 - the parent raises it
            answer = ("error", f"{branch}: {type(error).__name__}: {error}", 0)
        pipe.send((*answer, time.process_time() - began))


class _Arena:
    """The process' side of the memory: grows with what is put into it."""

    def __init__(self, fd: int) -> None:
        self._fd, self.size = fd, 0
        self._memory = torch.empty(0, dtype=torch.uint8)

    def put(self, tensors: Mapping[str, Tensor]) -> Layout:
        layout, end = [], 0
        for name, tensor in tensors.items():
            layout.append((name, tensor.dtype, tuple(tensor.shape), end))
            end += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
        if end > self.size:
            os.ftruncate(self._fd, end)
            self._memory, self.size = _shared(self._fd, end), end
        for name, view in _views(self._memory, layout).items():
            view.copy_(tensors[name])
        return layout


def _folder_of(prepare: Any) -> list[str]:
    """Where the module of a user's own is that was found beside a configuration: it is not on the path."""
    name = getattr(prepare, "__module__", None) or ""
    file = getattr(sys.modules.get(name), "__file__", None)
    if file is None or name.partition(".")[0] == "mmpipe":
        return []
    return [str(Path(file).absolute().parents[name.count(".") + Path(file).stem.count("__init__")])]


def _shared(fd: int, size: int) -> Tensor:
    return torch.frombuffer(mmap.mmap(fd, size), dtype=torch.uint8)


def _views(memory: Tensor, layout: Layout) -> dict[str, Tensor]:
    found = {}
    for name, dtype, shape, start in layout:
        size = dtype.itemsize * torch.Size(shape).numel()
        found[name] = memory[start : start + size].view(dtype).reshape(shape)
    return found


def _sent(branch: str, source: Any) -> Any:
    """A file to open, as it is sent: wherever the process is, whatever kind of path it is. None: no file; what is in
    memory is not sent anywhere."""
    if isinstance(source, media.View):
        inner = _sent(branch, source.source)
        return None if inner is None else replace(source, source=inner)
    if isinstance(source, os.PathLike) or (isinstance(source, str) and branch != "text"):
        try:
            return Path(os.path.abspath(os.fsdecode(source)))
        except (TypeError, ValueError, OSError):
            return None
    return None
