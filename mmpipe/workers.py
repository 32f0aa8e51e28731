"""A job in several processes, of one core each: nobody waits for Python's lock, and no small operation for a second
core.

    shards ─► Parts ─┬─► a thread of this process ═ socket ═► a worker ─┬─► whole shards, in order ─► done
                     ├─► a thread                 ═ socket ═► a worker ─┤
                     └─► what a worker was lost on: this process ───────┘

A worker is forked when all is built, packed and compiled, so that it has the models without a copy and is there in
milliseconds; it ends with the job. It computes with one thread alone: a forked process must not use the threads that
its parent had. Rows are the same whoever computes them. If a worker ends before its time, this process does its part,
and decodes it in processes that may die: the one file that ended it costs its row. What is given as bytes, and what
can't be sent, is decoded here after all.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import signal
import socket
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import torch

from mmpipe.errors import Interrupted, MmpipeError
from mmpipe.parts import Part, Parts
from mmpipe.runtime.ledger import Outcome
from mmpipe.runtime.shard import Answered
from mmpipe.types import Prediction, Sample

OWN_BYTES = 150_000_000  # that a worker takes for itself: what Python touches, and what malloc keeps
_TELL_S = 0.1  # between two messages that rows have been answered
_LOOK_S = 0.05
_SILENT_S = 20.0  # without a message, and as long without computing
_SIGNALS = (signal.SIGINT, signal.SIGTERM)

Done = Callable[[Sequence[Sample], list[Prediction], Outcome], None]
Run = Callable[[Iterable[Sequence[Sample]], Answered, Done, bool], None]  # shards in, each told of in order; warily


def available() -> bool:
    """Whether this system can fork a process that has loaded torch: macOS' own libraries can't be."""
    return sys.platform == "linux" and hasattr(os, "fork")


def run_side_by_side(parts: Parts, run: Run, answered: Answered, done: Done) -> None:
    """Run all parts: `run` is called in `parts.workers` forked processes, and here for parts that these were lost on
    (warily), or if there is none. `answered` and `done` are called here, on the caller's thread; `done` gets each
    shard, in order.

    Raises what `run` raises, here or there. However it ends, the processes have ended.
    """
    workers: list[_Worker] = []
    note = ""
    try:
        with _signals_held():  # else one could come when a process is there that nobody knows of
            try:
                for number in range(1, parts.workers + 1):
                    workers.append(_Worker(number, parts, run))
                for worker in workers:  # when all have been forked: none begins with a thread at work that it has not
                    worker.thread.start()
            except (OSError, RuntimeError) as error:  # no process, or no thread
                note = f"fewer than {parts.workers} processes compute: no more can be started: {error}"
        noted = _noting(done, lambda: [note, *(worker.note for worker in workers)])
        _Here(parts, run, answered, noted).do(workers)
    finally:
        parts.close()
        for worker in workers:
            worker.end()


class _Here:
    """What is left to this process: to tell of whole shards, and to do what no worker does."""

    def __init__(self, parts: Parts, run: Run, answered: Answered, done: Done) -> None:
        self._parts, self._run, self._to_answered, self._done = parts, run, answered, done
        self._taken: deque[Part] = deque()
        self._ending = False  # an error that ends all, as opposed to one part

    def do(self, workers: Sequence[_Worker]) -> None:
        while self._parts.wait(_LOOK_S):
            self._answered(0)
            if self._parts.any_lost():
                self._run_here(self._parts.take_lost, wary=True)
            elif not any(worker.thread.is_alive() for worker in workers):
                self._run_here(self._parts.take, wary=False)
        self._answered(0)

    def _run_here(self, take: Callable[[], Part | None], *, wary: bool) -> None:
        def taken() -> Iterator[Sequence[Sample]]:
            while (part := take()) is not None:
                self._taken.append(part)
                yield self._parts.samples(part)

        try:
            self._run(taken(), self._answered, self._did, wary)
        except Interrupted:
            raise
        except Exception as error:
            if self._ending:
                raise
            self._parts.fail(self._taken, error)  # raised when what comes before it has been told of
            self._taken.clear()

    def _answered(self, count: int) -> None:
        self._to_answered(count + self._parts.newly_answered())
        self._tell()

    def _did(self, samples: Sequence[Sample], predictions: list[Prediction], outcome: Outcome) -> None:
        self._parts.put(self._taken.popleft(), predictions, outcome)
        self._tell()

    def _tell(self) -> None:
        try:
            with torch.inference_mode(False):  # in the middle of a run too
                for shard in self._parts.whole():
                    self._done(*shard)
        except BaseException:
            self._ending = True
            raise


def _noting(done: Done, notes: Callable[[], Iterable[str]]) -> Done:
    def noted(samples: Sequence[Sample], predictions: list[Prediction], outcome: Outcome) -> None:
        outcome.notes += filter(None, notes())
        done(samples, predictions, outcome)

    return noted


class _Worker:
    """One forked process, and the thread of this one that talks to it. Raises OSError where none can be had."""

    def __init__(self, number: int, parts: Parts, run: Run) -> None:
        self.note, self._answered = "", 0
        self._parts, self._taken = parts, deque[Part]()
        ours, theirs = socket.socketpair()
        alive, ours_alive = os.pipe()  # read there: it ends when this process does
        try:
            self._pid = _fork()
        except OSError:
            ours.close()
            os.close(ours_alive)
            raise
        else:
            if not self._pid:
                _work(number, theirs.fileno(), alive, parts, run)
        finally:
            theirs.close()
            os.close(alive)
        self._pipe, self._alive = Connection(ours.detach()), ours_alive
        self.thread = threading.Thread(target=self._talk, name=f"mmpipe-worker-{number}", daemon=True)

    def _talk(self) -> None:
        try:
            while True:
                kind, value, count = self._heard()
                self._answered += count
                self._parts.answered(count)
                if kind == "wants":
                    _send(self._pipe, self._next())
                elif kind == "did":
                    self._parts.put(self._taken[0], *value)
                    self._taken.popleft()
                    self._answered = 0  # of what it is at; about
                elif kind == "failed":
                    self._parts.fail(self._taken, value)
                    return
                elif kind == "ends":
                    return
        except Exception as error:  # noqa: BLE001 - whatever it was, its parts are done by another
            how = self._ended() if isinstance(error, (EOFError, OSError)) else f"was not understood: {error}"
            self.note = f"a process that computed {how}: its samples were computed again"
            self._parts.answered(-self._answered)
            self._parts.give_back(self._taken)

    def _heard(self) -> Any:
        """The next message. A process that neither tells anything nor computes is ended: it waits for a lock that
        another thread held when it was forked."""
        spent = -1.0
        while not self._pipe.poll(_SILENT_S):
            before, spent = spent, _cpu_seconds(self._pid)
            if spent == before:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._pid, signal.SIGKILL)
        return _received(self._pipe)

    def _next(self) -> Part | None:
        self._parts.wait_for_room(self._taken)
        part = self._parts.take()
        if part is not None:
            self._taken.append(part)
        return part

    def _ended(self) -> str:
        """How, when it has. It is left to `end` to forget it: until then nobody else gets its number."""
        try:
            found = os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOWAIT)
        except ChildProcessError:  # where this process ignores its children's ends, nobody knows
            found = None
        if found is None:
            return "ended"
        killed = found.si_code != os.CLD_EXITED
        return f"crashed (signal {found.si_status})" if killed else f"ended (code {found.si_status})"

    def end(self) -> None:
        """Now, whatever it does."""
        if self.thread.ident is None or self.thread.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
        if self.thread.ident is not None:
            self.thread.join()
        self._pipe.close()
        os.close(self._alive)  # it ends, if it has not
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._pid, 0)


def _send(pipe: Connection, value: Any) -> None:
    """As bytes: `Connection.send` would hand tensors over by files that end with the process."""
    pipe.send_bytes(pickle.dumps(value, pickle.HIGHEST_PROTOCOL))


def _received(pipe: Connection) -> Any:
    return pickle.loads(pipe.recv_bytes())


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Ctrl-C and SIGTERM come afterwards. To block them would not do: Python's handlers run here whoever they reach."""
    came: list[int] = []
    before = {number: handler for number in _SIGNALS if callable(handler := signal.getsignal(number))}
    for kind in before:
        signal.signal(kind, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
        for number in came[:1]:
            signal.raise_signal(number)


def _cpu_seconds(pid: int) -> float:
    with contextlib.suppress(OSError, ValueError, IndexError):
        told = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        return (int(told[11]) + int(told[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def _fork() -> int:
    with warnings.catch_warnings():
        # Python fears for locks that other threads hold: a worker takes none of theirs, and starts its own threads
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


# --- the process ------------------------------------------------------------------------------------------------------


def _work(number: int, socket_fd: int, alive_fd: int, parts: Parts, run: Run) -> NoReturn:
    """What a worker does: parts in, what came of them out, until there are no more."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it reaches all of a terminal's; the parent decides
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _keep_only(socket_fd, alive_fd)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - another thread may have held their locks
        gc.freeze()  # what was there is not looked through again, which would copy it
        torch.set_num_threads(1)
        threading.Thread(target=_end_with_parent, args=(alive_fd,), daemon=True).start()
        _Work(number, Connection(socket_fd), parts).do(run)
    finally:
        os._exit(0)  # nothing is left to do, and what the parent would tidy up is the parent's


def _keep_only(*kept: int) -> None:
    """Let go of all other files: a lock, or another worker's socket, would be open for as long as this process is.
    Their numbers stay taken: objects that know them must not come to write into what is opened here."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for name in os.listdir("/proc/self/fd"):
        number = int(name)
        if number > 2 and number != nowhere and number not in kept:
            with contextlib.suppress(OSError):  # what listed them is gone
                os.fstat(number)
                os.dup2(nowhere, number)


def _end_with_parent(alive_fd: int) -> None:
    with contextlib.suppress(OSError):
        os.read(alive_fd, 1)
    os._exit(1)


class _Work:
    """The worker's side: what its run asks for and tells of goes to the parent."""

    def __init__(self, number: int, pipe: Connection, parts: Parts) -> None:
        self._number, self._pipe, self._parts = number, pipe, parts
        self._count, self._told = 0, time.monotonic()

    def do(self, run: Run) -> None:
        try:
            run(self._wanted(), self._answered, self._did, False)
        except BaseException as error:  # noqa: BLE001 - the parent raises it
            self._send("failed", _sendable(error))
        else:
            self._send("ends")

    def _wanted(self) -> Iterator[Sequence[Sample]]:
        while True:
            self._send("wants")
            part = _received(self._pipe)
            if part is None:
                return
            yield self._parts.samples(part)

    def _answered(self, count: int) -> None:
        self._count += count
        if time.monotonic() - self._told >= _TELL_S:
            self._send("answered")

    def _did(self, samples: Sequence[Sample], predictions: list[Prediction], outcome: Outcome) -> None:
        # every process has threads and streams of these names
        outcome.decodings = [replace(one, worker=f"{self._number}/{one.worker}") for one in outcome.decodings]
        outcome.spans = [replace(span, stream=f"{self._number}/{span.stream}") for span in outcome.spans]
        self._send("did", (predictions, outcome))

    def _send(self, kind: str, value: Any = None) -> None:
        _send(self._pipe, (kind, value, self._count))
        self._count, self._told = 0, time.monotonic()


def _sendable(error: BaseException) -> BaseException:
    """As it is, where another process could make it again; else its text."""
    with contextlib.suppress(Exception):
        pickle.loads(pickle.dumps(error))
        return error
    return MmpipeError(f"{type(error).__name__}: {error}")
