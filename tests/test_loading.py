"""What is done to the process while it loads and runs."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmpipe import loading
from mmpipe.loading import collector_spared


def collected(thing: object) -> bool:
    """Whether the collector looks through it. Counts of what is frozen would not tell: they fall whenever anything
    frozen is freed, by whichever thread."""
    return any(each is thing for each in gc.get_objects())


def test_a_job_spares_the_collector_what_is_there_and_gives_it_back() -> None:
    gc.unfreeze()
    before: list[object] = [[]]
    assert collected(before)
    with collector_spared():
        assert not collected(before)
        since: list[object] = [[]]
        assert collected(since)
    assert collected(before)
    assert gc.get_freeze_count() == 0


def test_in_a_long_run_freed_memory_is_given_back_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []
    now = [0.0]
    monkeypatch.setattr(loading.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(loading, "give_back_freed_memory", lambda: given.append(now[0]))
    for kept, want in ((False, []), (True, [30.0, 60.0])):
        monkeypatch.setattr(loading, "_KEEPS", [True] if kept else [])
        now[0] = 0.0
        give_back = loading.GivingBack()
        for seconds in (1.0, 19.0, 30.0, 49.0, 60.0):
            now[0] = seconds
            give_back()
        assert given == want


def test_what_the_process_has_frozen_itself_stays_so() -> None:
    gc.unfreeze()
    before: list[object] = [[]]
    gc.freeze()
    try:
        with collector_spared():
            assert not collected(before)
            since: list[object] = [[]]
        assert not collected(before)
        assert collected(since)  # and nothing is frozen that the process did not ask for
    finally:
        gc.unfreeze()


def test_the_demo_starts_without_compilers_and_model_libraries(tmp_path: Path) -> None:
    """Each of these imports takes as long as all else that a second start does."""
    slow = ("torch._dynamo", "sympy", "triton", "transformers", "open_clip", "torchvision")
    run = f"""
import sys
from mmpipe import Pipeline
with Pipeline.load("quickstart") as pipeline:
    pipeline.run(pipeline.find().samples[:8])
print(*[name for name in {slow} if name in sys.modules])
"""
    environment = {**os.environ, "MMPIPE_CACHE": str(tmp_path)}
    found = [
        subprocess.run([sys.executable, "-c", run], env=environment, capture_output=True, text=True, check=True).stdout
        for _ in range(2)  # the first captures, and keeps what it captured
    ]
    assert found[1].split() == []


def test_ctrl_c_within_a_finaliser_is_not_lost() -> None:
    """Python prints what is raised there, and drops it."""
    run = """
import os, signal, sys, time
from mmpipe.loading import heed_interrupts

class Thing:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):
            pass

heed_interrupts()
try:
    thing = Thing()
    del thing
    print("went on")
    for _ in range(1000):
        time.sleep(0.01)
    print("swallowed")
except KeyboardInterrupt:
    print("interrupted")
"""
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[-2] == "interrupted"
    assert "swallowed" not in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("code", [0, 3, 130])
def test_a_process_that_ends_at_once_does_what_is_due(code: int) -> None:
    """Threads, exit functions and what was printed; not the interpreter's own taking down."""
    run = f"""
import atexit, sys, threading, time
from mmpipe.loading import end

class Thing:
    def __del__(self):
        print("taken down")

thing = Thing()
atexit.register(print, "registered")
threading.Thread(target=lambda: (time.sleep(0.3), print("thread"))).start()
print("error", file=sys.stderr)
print("begun")
end({code})
"""
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (code, "error\n")
    assert done.stdout.split() == ["begun", "thread", "registered"]
