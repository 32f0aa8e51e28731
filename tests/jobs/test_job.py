"""The folder job, end to end: one row a sample, whatever happens to files, models, disks and processes."""

from __future__ import annotations

import json
import os
import resource
import signal
import struct
import time
import zlib

import pyarrow.parquet as pq
import pytest
import soundfile
from PIL import Image
from support import shop, words

from mmpipe import Interrupted, MmpipeError, OutputError, Pipeline
from mmpipe.jobs.progress import Silent
from mmpipe.runtime import streams


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return shop.weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def full(weights):
    with Pipeline.load(shop.config(weights)) as made:
        yield made


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Texts only, 16 rows a shard."""
    with Pipeline.load(words.config(tmp_path_factory.mktemp("words"))) as made:
        yield made


def rows(out):
    """Every row of a job; a reader sees whole shards and nothing else."""
    parts = sorted((out / "predictions").glob("*"))
    assert [part.name for part in parts] == [f"part-{number:05d}.parquet" for number in range(len(parts))]
    return [row for part in parts for row in pq.read_table(part).to_pylist()]


def run_json(out):
    return json.loads((out / "run.json").read_text(encoding="utf-8"))


def png_of(width, height):
    """A header that promises a huge picture."""
    data = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + data
    header = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(data)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return header + struct.pack(">I", 100) + b"IDAT" + bytes(104)


def damage(folder):
    """Broken files of sixteen kinds; returns id → what the row's error begins with."""
    folder.mkdir()
    picture, sound = folder / "whole.png", folder / "whole.wav"
    Image.effect_noise((64, 48), 80).convert("RGB").save(picture)
    Image.effect_noise((64, 48), 80).convert("RGB").save(folder / "whole.jpg")
    soundfile.write(sound, [0.1, -0.1] * 8000, 16000)
    jpeg, wav, png = (folder / "whole.jpg").read_bytes(), sound.read_bytes(), picture.read_bytes()
    for path in (picture, sound, folder / "whole.jpg"):
        path.unlink()
    contents = {
        "a-empty.jpg": (b"", "image:empty"),
        "b-cut.jpg": (jpeg[: len(jpeg) // 2], "image:truncated"),
        "c-cut.png": (png[: len(png) // 2], "image:truncated"),
        "d-words.jpg": (b"these are words", "image:"),
        "e-huge.png": (png_of(60_000, 60_000), "image:too_large"),
        "f-sound.png": (wav, "image:"),
        "g-zeros.gif": (bytes(500), "image:"),
        "h-empty.wav": (b"", "audio:empty"),
        "i-picture.wav": (png, "audio:"),
        "j-cut.flac": (b"fLaC\x00\x00\x00\x22", "audio:"),
        "k-noise.mp3": (bytes(range(256)) * 4, "audio:"),
        "l-empty.txt": (b"", "text:empty"),
        "m-spaces.txt": (b" \n\t ", "text:empty"),
        "n-latin.txt": ("naïve café".encode("latin-1"), "text:not_text"),
        "o-binary.txt": (b"a\x00b", "text:not_text"),
    }
    for name, (content, _) in contents.items():
        (folder / name).write_bytes(content)
    os.symlink("nowhere.txt", folder / "p-link.txt")
    expected = {name.rpartition(".")[0]: says for name, (_, says) in contents.items()} | {"p-link": "text:not_found"}
    for name in ("a-empty", "h-empty", "z-good"):
        (folder / f"{name}.txt").write_text("old oak desk", encoding="utf-8")
    return expected


def test_sixteen_broken_files_are_sixteen_reasons_and_the_job_goes_on(full, tmp_path):
    expected = damage(tmp_path / "media")
    summary = full.run_folder(tmp_path / "media", tmp_path / "out")
    found = {row["id"]: row for row in rows(tmp_path / "out")}
    assert list(found) == sorted([*expected, "z-good"])
    for name, says in expected.items():
        row = found[name]
        assert row["error"].startswith(says), (name, row["error"])
        assert str(tmp_path) not in row["error"]
        has_text_too = name in ("a-empty", "h-empty")
        assert row["status"] == ("partial" if has_text_too else "failed")
        assert (row["label"] is None, row["confidence"] is None) == (not has_text_too, not has_text_too)
        assert row["failed"] == [says.partition(":")[0]]
    assert found["z-good"]["status"] == "ok"
    assert run_json(tmp_path / "out")["status"] == {"ok": 1, "partial": 2, "failed": 14}
    assert sum(run_json(tmp_path / "out")["errors"].values()) == 16
    assert summary.exit_code() == summary.exit_code(strict=True) == 3


def test_exit_codes_count_failed_rows_and_strict_counts_partial_ones_too(full, tmp_path):
    folder = shop.media(tmp_path / "media", 25)
    (folder / "item-000.png").write_bytes(b"\x89PNG")
    summary = full.run_folder(folder, tmp_path / "partial")
    assert summary.tally.status == {"ok": 24, "partial": 1}
    assert (summary.exit_code(), summary.exit_code(strict=True)) == (0, 3)
    assert "1 partial" in summary.verdict(strict=True)
    (folder / "item-000.txt").unlink()
    (folder / "item-000.wav").unlink()
    summary = full.run_folder(folder, tmp_path / "failed")
    assert summary.tally.status["failed"] == 1  # of 25: 4%
    assert (summary.exit_code(), summary.exit_code(strict=True)) == (0, 3)
    (folder / "item-001.png").write_bytes(b"")
    (folder / "item-001.txt").unlink()
    summary = full.run_folder(folder, tmp_path / "more")
    assert summary.tally.status["failed"] == 2  # 8%
    assert summary.exit_code() == 3
    assert "2 of 25 failed" in summary.verdict()


def test_rows_are_in_order_and_shards_are_full_but_the_last(plain, tmp_path):
    folder = words.texts(tmp_path / "media", 40)
    summary = plain.run_folder(folder, tmp_path / "out")
    assert [row["id"] for row in rows(tmp_path / "out")] == [f"{number:05d}" for number in range(40)]
    counts = [pq.read_metadata(part).num_rows for part in sorted((tmp_path / "out/predictions").iterdir())]
    assert counts == [16, 16, 8]
    assert run_json(tmp_path / "out") == summary.run
    assert summary.run["stopped"] is None
    assert summary.run["interrupted"] is False
    assert (tmp_path / "out/report.html").read_text().startswith("<!doctype html>")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["predictions", "report.html", "run.json"]
    assert plain.run_folder(folder, tmp_path / "three", limit=3).tally.rows == 3


def test_two_runs_and_any_number_of_decode_workers_write_the_same_bytes(weights, tmp_path):
    from dataclasses import replace

    folder = shop.media(tmp_path / "media", 30)
    (folder / "item-004.png").write_bytes(b"")
    config = shop.config(
        weights,
        [{"after": "image", "threshold": 0.55}],
        output={"shard_rows": 8, "probabilities": True, "embeddings": True},
    )
    written = []
    with Pipeline.load(config) as pipeline:
        for number, workers in enumerate((1, 1, 5)):
            pipeline.runners._resolved["batch"] = replace(pipeline.resolved, decode_workers=workers)
            pipeline.runners._began = True
            out = tmp_path / f"out{number}"
            pipeline.run_folder(folder, out)
            written.append({part.name: part.read_bytes() for part in (out / "predictions").iterdir()})
    assert len(written[0]) == 4
    assert written[0] == written[1] == written[2]


def test_a_model_that_fails_ends_the_job_names_the_segment_and_keeps_whole_shards(plain, tmp_path):
    folder = words.texts(tmp_path / "media", 40)
    (folder / "00035.txt").write_text("out of range")
    with pytest.raises(MmpipeError, match=r"segment text@0 failed: IndexError: index out of range") as caught:
        plain.run_folder(folder, tmp_path / "out")
    assert caught.value.exit_code == 1
    kept = len(rows(tmp_path / "out"))
    assert kept in (16, 32)  # the third shard is computed beside the second, and may fail before that is written
    run = run_json(tmp_path / "out")
    assert run["rows"] == kept
    assert "segment text@0" in run["stopped"]
    assert run["interrupted"] is False
    assert (tmp_path / "out/report.html").is_file()


def test_code_of_ones_own_that_raises_costs_its_row_and_no_other(plain, tmp_path):
    folder = words.texts(tmp_path / "media", 20)
    (folder / "00007.txt").write_text("unusable; image:odd: \ud83d \x1b[2J".encode("utf-8", "ignore").decode())
    plain.run_folder(folder, tmp_path / "out")
    statuses = [row["status"] for row in rows(tmp_path / "out")]
    assert statuses.count("failed") == 1
    assert statuses[7] == "failed"
    assert rows(tmp_path / "out")[7]["error"].startswith("text:unusable: ValueError: unusable")


def test_input_that_vanishes_during_the_run_is_rows_not_an_end(plain, tmp_path):
    folder = words.texts(tmp_path / "media", 40)
    listing = plain.find(folder)
    for number in range(20, 40):
        (folder / f"{number:05d}.txt").unlink()
    from mmpipe.jobs.job import run_job

    summary = run_job(plain, listing, tmp_path / "out")
    assert [row["status"] for row in rows(tmp_path / "out")] == ["ok"] * 20 + ["failed"] * 20
    assert summary.run["errors"] == {"text:not_found": 20}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a limit on file sizes")
def test_a_full_disk_is_one_clear_error_and_leaves_no_half_shard(plain, tmp_path):
    folder = words.texts(tmp_path / "media", 60)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(MmpipeError, match=r"writing to .* failed") as caught:
            plain.run_folder(folder, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.exit_code == 1
    assert rows(tmp_path / "out") == []
    left = {path.name for path in (tmp_path / "out").rglob("*")}
    assert left <= {"predictions", "run.json"}  # the report is larger than the disk


def test_an_output_inside_the_input_is_refused_and_one_beside_it_is_not(plain, tmp_path):
    folder = words.texts(tmp_path / "media", 2)
    for inside in (folder / "out", folder, folder / "a/../b"):
        with pytest.raises(OutputError, match="inside the input"):
            plain.run_folder(folder, inside)
    assert len(list(folder.iterdir())) == 2
    plain.run_folder(folder, tmp_path / "media-out")


class Killing(Silent):
    """Sends this process a signal at the first answer after two shards have been committed, and again and again.

    Answers of the next shard may come before the last ones of a shard: how many there are says nothing of shards.
    """

    def __init__(self, number, out):
        self.number, self.out, self.committed = number, out, 0

    def advance(self, count):
        shards = len(list(self.out.glob("predictions/part-*.parquet")))
        if shards >= 2:
            self.committed = self.committed or shards
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_keeps_whole_shards_and_says_so(plain, tmp_path, number, code):
    folder = words.texts(tmp_path / "media", 60)
    before = signal.getsignal(number)
    killing = Killing(number, tmp_path / "out")
    with pytest.raises(Interrupted) as caught:
        plain.run_folder(folder, tmp_path / "out", progress=killing)
    assert caught.value.exit_code == code
    assert signal.getsignal(number) is before
    kept = 16 * killing.committed
    assert kept in (32, 48)
    assert len(rows(tmp_path / "out")) == kept
    run = run_json(tmp_path / "out")
    assert (run["interrupted"], run["rows"]) == (True, kept)
    assert "interrupted" in (tmp_path / "out/report.html").read_text()
    assert plain.run_folder(folder, tmp_path / "out", mode="overwrite").tally.rows == 60


def test_a_signal_while_a_shard_is_committed_waits_until_it_is_counted(plain, tmp_path, monkeypatch):
    folder = words.texts(tmp_path / "media", 60)
    fsync = os.fsync

    def fsync_and_ctrl_c(file):
        fsync(file)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(os, "fsync", fsync_and_ctrl_c)
    with pytest.raises(Interrupted):
        plain.run_folder(folder, tmp_path / "out")
    assert run_json(tmp_path / "out")["rows"] == len(rows(tmp_path / "out")) == 16


def test_a_run_that_was_killed_leaves_whole_shards_and_can_be_overwritten(tmp_path):
    process = slow_run(tmp_path, "out")
    busy = words.mmpipe("run", "words.yaml", "--input", "media", "--output", "out", "--mode", "overwrite", cwd=tmp_path)
    assert busy.returncode == 4
    assert "in use by another run" in busy.stderr
    assert "building" not in busy.stderr
    process.kill()
    process.communicate(timeout=60)
    seen = pq.read_table(tmp_path / "out/predictions")  # as a reader finds it; what begins with a dot is no part
    assert set(seen.column("status").to_pylist()) == {"ok"}
    assert seen.num_rows in range(16, 400, 16)
    (tmp_path / "out/predictions/.part-00009.parquet.tmp").write_bytes(b"half")
    words.config(tmp_path)
    with Pipeline.load(tmp_path / "words.yaml") as pipeline:
        with pytest.raises(OutputError, match="not empty"):
            pipeline.run_folder(tmp_path / "media", tmp_path / "out")
        pipeline.run_folder(tmp_path / "media", tmp_path / "out", mode="overwrite", limit=20)
    assert len(rows(tmp_path / "out")) == 20
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["predictions", "report.html", "run.json"]


def slow_run(tmp_path, name):
    """A run in another process that takes some ten seconds and has committed its first shard."""
    words.texts(tmp_path / "media", 400)
    words.config(tmp_path, seconds=0.05)
    process = words.started("run", "words.yaml", "--input", "media", "--output", name, cwd=tmp_path)
    deadline = time.monotonic() + 60
    while not (tmp_path / name / "predictions/part-00000.parquet").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


def test_a_signal_while_a_segment_is_computed_is_no_failure_of_the_model(tmp_path, monkeypatch):
    """A large model's is computed on the thread that signals come to."""
    folder, do, steps = words.texts(tmp_path / "media", 60), streams._do, []

    def do_and_ctrl_c(work, run, step, stream):
        def work_and_ctrl_c():
            work()
            steps.append(step)
            if len(steps) == 3:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.01)  # Python calls its handler between two of its own operations

        do(work_and_ctrl_c, run, step, stream)

    monkeypatch.setattr("mmpipe.placing._NUMBERS_FOR_THREADS", 0)
    monkeypatch.setattr(streams, "_do", do_and_ctrl_c)
    with Pipeline.load(words.config(tmp_path)) as pipeline:
        assert pipeline.resolved.streams == "caller"
        with pytest.raises(Interrupted) as caught:
            pipeline.run_folder(folder, tmp_path / "out")
    assert len(steps) == 3
    assert caught.value.exit_code == 130
    assert run_json(tmp_path / "out")["interrupted"] is True
