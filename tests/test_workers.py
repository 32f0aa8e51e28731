"""A job in several processes: the same rows, whoever computes them and whatever becomes of who does."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import threading
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from support import shop, words

from mmpipe import Interrupted, MmpipeError, Pipeline, Sample
from mmpipe.errors import ConfigError
from mmpipe.jobs.progress import Silent
from mmpipe.workers import available

pytestmark = pytest.mark.skipif(not available(), reason="no process can be forked here")

# a text "forked: …" is heard only in a forked process
_PARTS = """
import os
import time

import word_parts


class Words(word_parts.Words):
    def __init__(self, seconds=0.0):
        super().__init__(seconds)
        self.first = os.getpid()

    def prepare(self, media):
        told, _, what = media.partition(": ")
        if told == "forked" and os.getpid() != self.first:
            if what == "killed":
                os.kill(os.getpid(), 9)
            if what == "long":
                time.sleep(100)
        return super().prepare(what if told == "forked" else media)
"""


def own(folder, *, workers=2, **options):
    """A pipeline of one text encoder, of a user's own."""
    path = words.config(folder, **options)
    (folder / "forked_parts.py").write_text(_PARTS, encoding="utf-8")
    made = json.loads(path.read_text(encoding="utf-8"))
    made["encoders"]["text"]["model"] = "forked_parts:Words"
    made["runtime"]["processes"] = workers
    path.write_text(json.dumps(made), encoding="utf-8")
    return path


def samples_of(texts):
    return [Sample(f"{number:04d}", {"text": text}) for number, text in enumerate(texts)]


def texts_in(folder, texts):
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number:04d}.txt").write_text(text, encoding="utf-8")
    return folder


def rows(out):
    return pq.read_table(out / "predictions").to_pylist()


def started():
    """Processes that this one has started and not waited for."""
    task = Path(f"/proc/{os.getpid()}/task")
    return {pid for one in task.iterdir() for pid in (one / "children").read_text(encoding="ascii").split()}


@pytest.fixture
def children():
    """What the test has left. Other tests in this process may have started what lives on: multiprocessing's tracker."""
    before = started()
    return lambda: started() - before


def is_there(pid):
    """Running, not ended and left for its parent to notice."""
    try:
        return (
            Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[0] != "Z"
        )
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    return shop.media(tmp_path_factory.mktemp("media"), 100)


def shop_of(weights, workers, *, exits=shop.EXITS, **fusion):
    made = shop.config(weights, exits, output={"shard_rows": 40, "probabilities": True, "embeddings": True})
    made["runtime"]["processes"] = workers
    made["fusion"] |= fusion
    return made


@pytest.mark.parametrize("fusion", [{}, {"deliberate": {"below": 0.9, "views": 2}}, {"audit": {"share": "50%"}}])
def test_rows_are_the_same_whatever_the_number_of_processes(weights, media, tmp_path, fusion, children):
    found, runs = [], []
    for count in (2, 3):
        with Pipeline.load(shop_of(weights, count, **fusion)) as pipeline:
            assert (pipeline.resolved.processes, pipeline.resolved.threads) == (count, 1)
            runs.append(pipeline.run_folder(media, tmp_path / f"{count}").run)
            found.append(rows(tmp_path / f"{count}"))
    with Pipeline.load(shop_of(weights, 1, **fusion)) as pipeline:
        pipeline.run_folder(media, tmp_path / "1")
    assert found[0] == found[1]
    assert len(found[0]) == 100
    assert [row["id"] for row in found[0]] == sorted(row["id"] for row in found[0])
    alone = rows(tmp_path / "1")
    for name in ("id", "label", "answered_by", "deliberated", "used", "skipped", "present", "error"):
        assert [row[name] for row in found[0]] == [row[name] for row in alone], name
    assert runs[0]["answered_by"] == runs[1]["answered_by"]
    assert runs[0]["files_opened"] == runs[1]["files_opened"]
    assert runs[0]["seconds"]["cpu"] > 0
    assert not children()


def test_every_process_computes(weights, media):
    with Pipeline.load(shop_of(weights, 2)) as pipeline:
        seen = []
        whole = list(pipeline.find(media).samples)
        pipeline.settle(whole)
        pipeline.run_shards([whole], lambda samples, predictions, outcome: seen.append(outcome))
    assert {one.worker.partition("/")[0] for one in seen[0].decodings} == {"1", "2"}
    assert len(seen[0].exit_N) == 100
    assert {row for look in seen[0].looks for row in look.rows} == set(range(100))


def test_lists_and_embeddings_from_python(weights, media):
    with Pipeline.load(shop_of(weights, 2)) as several, Pipeline.load(shop_of(weights, 1)) as one:
        found = list(several.find(media).samples)
        assert [p.label for p in several.predict(found)] == [p.label for p in one.predict(found)]
        assert torch.allclose(torch.from_numpy(several.embed(found)), torch.from_numpy(one.embed(found)), atol=1e-5)
        in_memory = [{"text": f"a red mug {number}"} for number in range(40)]
        assert [p.label for p in several.predict(in_memory)] == [p.label for p in one.predict(in_memory)]
        assert several(text="a red mug").label == one(text="a red mug").label


def test_progress_counts_every_row_once_and_on_the_caller_s_thread(weights, media, tmp_path):
    counts, threads = [], set()

    class Counting(Silent):
        def advance(self, count):
            counts.append(count)
            threads.add(threading.current_thread())

    with Pipeline.load(shop_of(weights, 2)) as pipeline:
        pipeline.run_folder(media, tmp_path / "out", progress=Counting())
    assert sum(counts) == 100
    assert threads == {threading.main_thread()}


def test_a_medium_that_ends_who_decodes_it_costs_its_row(tmp_path, children):
    folder = texts_in(tmp_path / "media", ["forked: killed" if n == 50 else f"item {n}" for n in range(200)])
    with Pipeline.load(own(tmp_path / "several")) as pipeline:
        run = pipeline.run_folder(folder, tmp_path / "out").run
    with Pipeline.load(own(tmp_path / "one", workers=1)) as pipeline:
        pipeline.run_folder(folder, tmp_path / "alone")
    found, alone = rows(tmp_path / "out"), rows(tmp_path / "alone")
    lost = found.pop(50)
    assert lost["id"] == alone.pop(50)["id"]
    assert lost["error"].startswith("text:corrupt: ")
    assert lost["error"].endswith("the decoder crashed (signal 9) on it")
    assert [(row["id"], row["label"]) for row in found] == [(row["id"], row["label"]) for row in alone]
    assert run["status"] == {"ok": 199, "partial": 0, "failed": 1}
    assert any("crashed (signal 9): its samples were computed again" in note for note in run["notes"])
    assert not children()


def test_every_process_but_this_one_may_be_killed(tmp_path, children):
    with Pipeline.load(own(tmp_path / "several", workers=4)) as pipeline:
        answers = pipeline.predict(samples_of(["forked: killed"] * 200))  # texts in memory are not sent elsewhere
    assert [answer.status for answer in answers] == ["ok"] * 200
    assert not children()


def test_who_ignores_the_ends_of_its_processes_loses_no_row_either(tmp_path):
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with Pipeline.load(own(tmp_path / "several")) as pipeline:
            answers = pipeline.predict(samples_of(["forked: killed"] * 100))
            assert len(pipeline.predict(samples_of(["item"] * 100))) == 100
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert {answer.status for answer in answers} == {"ok"}


def test_a_process_that_never_begins_is_done_without(tmp_path, monkeypatch):
    monkeypatch.setattr("mmpipe.workers._SILENT_S", 0.2)
    monkeypatch.setattr("mmpipe.workers._keep_only", lambda *files: time.sleep(60))
    with Pipeline.load(own(tmp_path / "several")) as pipeline:
        began = time.monotonic()
        assert len(pipeline.predict(samples_of([f"item {number}" for number in range(100)]))) == 100
        assert time.monotonic() - began < 30


def test_pictures_that_are_open_are_read_in_one_process(weights, tmp_path):
    folder = shop.media(tmp_path / "media", 100)
    with Pipeline.load(shop_of(weights, 2)) as pipeline:
        files = [sample.media["image"] for sample in pipeline.find(folder).samples if "image" in sample.media]
        want = pipeline.predict([{"image": file} for file in files])
        found = pipeline.predict([{"image": Image.open(file)} for file in files])
    assert [answer.status for answer in found] == ["ok"] * len(files)
    assert [answer.label for answer in found] == [answer.label for answer in want]


def test_a_lock_of_the_parent_s_outlives_its_processes(tmp_path):
    folder = texts_in(tmp_path / "media", [f"item {number}" for number in range(100)])
    lock = open(tmp_path / "lock", "w")  # noqa: SIM115 - held while the job runs
    fcntl.flock(lock, fcntl.LOCK_EX)
    with Pipeline.load(own(tmp_path / "several")) as pipeline:
        assert pipeline.run_folder(folder, tmp_path / "out").run["rows"] == 100
    with open(tmp_path / "lock", "w") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    lock.close()


def test_no_process_to_be_had_is_no_end(tmp_path, monkeypatch):
    def refused():
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(os, "fork", refused)
    folder = texts_in(tmp_path / "media", [f"item {number}" for number in range(100)])
    with Pipeline.load(own(tmp_path / "several")) as pipeline:
        run = pipeline.run_folder(folder, tmp_path / "out").run
    assert run["rows"] == 100
    assert any("fewer than 2 processes compute: no more can be started" in note for note in run["notes"])


def test_what_fails_in_a_process_ends_the_job_with_its_reason_after_whole_shards(tmp_path, children):
    texts = [f"item {number}" for number in range(200)]
    texts[150] = "out of range"
    folder = texts_in(tmp_path / "media", texts)
    with Pipeline.load(own(tmp_path / "several", seconds=0.001)) as pipeline:
        with pytest.raises(MmpipeError, match="segment text@0 failed: IndexError"):
            pipeline.run_folder(folder, tmp_path / "out")
        kept = len(rows(tmp_path / "out"))
        assert kept % 16 == 0
        assert kept <= 144
        (folder / "0150.txt").write_text("item", encoding="utf-8")
        assert pipeline.run_folder(folder, tmp_path / "out", mode="overwrite").run["rows"] == 200
    assert not children()


def test_what_is_wrong_with_a_medium_is_its_row_s_reason(tmp_path):
    texts = [f"unusable {number}" if number % 9 == 0 else f"item {number}" for number in range(100)]
    texts[18] = "unusable " + "and long " * 10_000  # which the error quotes
    with Pipeline.load(own(tmp_path / "several")) as pipeline:
        answers = pipeline.predict(samples_of(texts))
    assert [p.status == "failed" for p in answers] == [number % 9 == 0 for number in range(100)]
    assert answers[9].error == "text:unusable: ValueError: unusable 9"
    assert answers[18].error.startswith("text:unusable: ValueError: unusable and long and long")
    assert len(answers[18].error) < 600


def test_ctrl_c_ends_every_process_at_once_and_keeps_whole_shards(tmp_path, children):
    texts = [f"item {number}" if number < 150 else "forked: long" for number in range(400)]
    folder = texts_in(tmp_path / "media", texts)

    class Killing(Silent):
        def advance(self, count):
            if len(list((tmp_path / "out/predictions").glob("part-*"))) >= 2:
                os.kill(os.getpid(), signal.SIGINT)

    with Pipeline.load(own(tmp_path / "several", seconds=0.002)) as pipeline:
        began = time.monotonic()
        with pytest.raises(Interrupted):
            pipeline.run_folder(folder, tmp_path / "out", progress=Killing())
        assert time.monotonic() - began < 30
    kept = rows(tmp_path / "out")
    assert len(kept) >= 32
    assert len(kept) % 16 == 0
    assert not children()


def test_processes_end_with_the_one_that_started_them_and_hold_no_lock(tmp_path):
    own(tmp_path, seconds=0.02)
    texts_in(tmp_path / "media", [f"item {number}" for number in range(400)])
    process = words.started("run", "words.yaml", "--input", "media", "--output", "out", cwd=tmp_path)
    deadline = time.monotonic() + 60
    while not (tmp_path / "out/predictions/part-00000.parquet").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="ascii").split()
    assert len(found) == 2
    assert all(map(is_there, found))
    process.kill()
    process.communicate(timeout=60)
    while any(map(is_there, found)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    again = words.mmpipe(
        "run", "words.yaml", "--input", "media", "--output", "out", "--mode", "overwrite", "--limit", 20, cwd=tmp_path
    )
    assert again.returncode == 0, again.stderr


def test_what_is_known_is_not_computed_again_by_any_process(weights, media, tmp_path, monkeypatch):
    monkeypatch.setenv("MMPIPE_CACHE", str(tmp_path / "cache"))
    with Pipeline.load(shop_of(weights, 2, exits=[])) as pipeline:
        first = pipeline.run_folder(media, tmp_path / "a").run["cache"]
        again = pipeline.run_folder(media, tmp_path / "b").run["cache"]
    with Pipeline.load(shop_of(weights, 3, exits=[])) as pipeline:
        other = pipeline.run_folder(media, tmp_path / "c").run["cache"]
    assert sum(first["misses"].values()) > 200
    assert again["misses"] == other["misses"] == {"image": 0, "text": 0, "audio": 0}
    assert rows(tmp_path / "a") == rows(tmp_path / "b") == rows(tmp_path / "c")


def test_observers_see_every_row_of_a_job(weights, media):
    with Pipeline.load(shop_of(weights, 2, exits=[])) as pipeline:
        found, seen = list(pipeline.find(media).samples), []
        with pipeline.observe("text", lambda observation: seen.extend(observation.ids)):
            pipeline.predict(found)
    assert sorted(seen) == [sample.id for sample in found if "text" in sample.media]


def test_another_thread_of_the_caller_s_forks_nothing(weights, media, monkeypatch):
    def refused():
        raise AssertionError

    monkeypatch.setattr("mmpipe.workers._fork", refused)
    with Pipeline.load(shop_of(weights, "auto")) as pipeline:
        found, answers = list(pipeline.find(media).samples), []
        thread = threading.Thread(target=lambda: answers.extend(pipeline.predict(found)))
        thread.start()
        thread.join()
        assert len(answers) == 100
        assert "thread that is not the main one" in pipeline.resolved.reasons["processes"]


@pytest.mark.parametrize(
    ("runtime", "why"),
    [
        ({"schedule": "parallel"}, "parallel is for branches side by side in one process"),
        ({"decoding": "processes"}, "processes is for one process that computes"),
    ],
)
def test_where_several_can_t_be_had_they_are_refused(weights, runtime, why):
    made = shop_of(weights, 2)
    made["runtime"] |= runtime
    with pytest.raises(ConfigError, match=why):
        Pipeline.load(made)
