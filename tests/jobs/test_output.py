"""Who may write into an output folder, and what may be replaced in it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmpipe.errors import ConfigError, OutputError
from mmpipe.jobs import shards
from mmpipe.jobs.output import EMPTY, claimed, refuse


def a_job(folder):
    """What a job leaves behind."""
    columns = shards.schema({"text": 2}, 2, {})
    shards.write_shard(folder / "predictions", 0, shards.table([], columns))
    (folder / "run.json").write_text('{"rows": 0, "fingerprints": {}}')
    (folder / "report.html").write_text("<!doctype html>\n<html><head><title>x – mmpipe report</title>")
    return folder


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_new_or_empty_folder_is_made_held_and_given_back(tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "a/b", tmp_path / "empty"):
        refuse(folder, "new")
        with claimed(folder, "new"):
            assert (folder / ".mmpipe.lock").exists()
        assert not (folder / ".mmpipe.lock").exists()


def test_refuse_changes_nothing(tmp_path):
    refuse(tmp_path / "a/b", "new")
    assert names(tmp_path) == []
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(OutputError):
        refuse(tmp_path, "new")
    assert names(tmp_path) == ["mine.txt"]
    before = names(a_job(tmp_path))
    refuse(tmp_path, "overwrite")
    assert names(tmp_path) == before


def test_anything_in_the_folder_is_refused_without_overwrite(tmp_path):
    a_job(tmp_path)
    for attempt in (refuse, lambda folder, mode: claimed(folder, mode).__enter__()):
        with pytest.raises(OutputError, match=r"not empty \(report.html, run.json, predictions/part-00000.parquet\)"):
            attempt(tmp_path, "new")
    assert (tmp_path / "predictions/part-00000.parquet").exists()


def test_overwrite_removes_what_mmpipe_wrote_and_nothing_else(tmp_path):
    a_job(tmp_path)
    mine = ["notes.txt", "predictions/mine.parquet", "predictions/part-mine.parquet", "sub/run.json", "run.json.bak"]
    for name in mine:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    for name in ("predictions/.part-00001.parquet.tmp", ".run.json.tmp", ".report.html.x1_y.tmp"):
        (tmp_path / name).write_text("half, of a run that was killed")
    with claimed(tmp_path, "overwrite"):
        assert names(tmp_path) == sorted([*mine, "predictions", "sub", ".mmpipe.lock"])


@pytest.mark.parametrize("name", ["run.json", "report.html", "predictions/part-00000.parquet"])
@pytest.mark.parametrize(
    "content", [b"[1]", b"", b"{}", b"<html>my mmpipe notes</html>", b'"my fingerprints"', b"[" * 100_000]
)
def test_files_of_our_names_that_are_not_ours_are_refused_even_by_overwrite(tmp_path, name, content):
    (tmp_path / "predictions").mkdir()
    (tmp_path / name).write_bytes(content)
    for attempt in (refuse, lambda folder, mode: claimed(folder, mode).__enter__()):
        with pytest.raises(OutputError, match="not written by mmpipe"):
            attempt(tmp_path, "overwrite")
    assert (tmp_path / name).read_bytes() == content


@pytest.mark.parametrize("name", ["run.json", "report.html", "predictions/part-00000.parquet"])
def test_a_pipe_of_our_name_is_not_waited_for(tmp_path, name):
    (tmp_path / "predictions").mkdir()
    os.mkfifo(tmp_path / name)
    with pytest.raises(OutputError, match="not written by mmpipe"):
        refuse(tmp_path, "overwrite")


def test_a_folder_of_an_unfinished_files_name_is_refused(tmp_path):
    (tmp_path / ".run.json.tmp").mkdir()
    with pytest.raises(OutputError, match="is a folder, which mmpipe did not make"):
        refuse(tmp_path, "overwrite")


def test_what_never_replaces_does_not_say_that_it_could(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"not empty.*: give another folder$"):
        refuse(tmp_path, EMPTY)


def test_a_parquet_file_of_someone_else_is_not_ours(tmp_path):
    (tmp_path / "predictions").mkdir()
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "predictions/part-00000.parquet")
    with pytest.raises(OutputError, match="not written by mmpipe"):
        refuse(tmp_path, "overwrite")


@pytest.mark.parametrize("place", ["file", "file/below", "file/a/b"])
def test_an_output_that_is_a_file_or_below_one(tmp_path, place):
    (tmp_path / "file").write_text("x")
    for attempt in (refuse, lambda folder, mode: claimed(folder, mode).__enter__()):
        with pytest.raises(OutputError, match="is a file"):
            attempt(tmp_path / place, "overwrite")


def test_predictions_that_are_a_file(tmp_path):
    (tmp_path / "predictions").write_text("x")
    with pytest.raises(OutputError, match="is a file where a folder has to be"):
        refuse(tmp_path, "overwrite")


@pytest.mark.parametrize("name", ["x" * 300, "nul\0"])
def test_names_that_can_not_be(tmp_path, name):
    with pytest.raises(OutputError, match="can't be made"), claimed(tmp_path / name, "new"):
        pass


@pytest.mark.parametrize("mode", ["resume", "Overwrite", ""])
def test_modes_that_there_are_not(tmp_path, mode):
    with pytest.raises(ConfigError, match=r"--mode: (resume is not implemented yet|no such mode)"):
        refuse(tmp_path, mode)


def test_read_only_folders_are_refused():
    """As a user without root's rights, in a process of its own."""
    script = (
        "import os, sys; from pathlib import Path\n"
        "from mmpipe.errors import OutputError; from mmpipe.jobs.output import refuse\n"
        "if os.geteuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "for place in sys.argv[1:]:\n"
        "    try: refuse(Path(place), 'new'); sys.exit('let in: ' + place)\n"
        '    except OutputError as error: assert "can\'t be" in str(error), error\n'
    )
    with tempfile.TemporaryDirectory() as made:
        top = Path(made)
        (top / "locked").mkdir()
        (top / "parts/predictions").mkdir(parents=True)
        for folder, mode in ((top, 0o755), (top / "locked", 0o555), (top / "parts", 0o777)):
            folder.chmod(mode)
        (top / "parts/predictions").chmod(0o555)
        places = [str(top / "locked"), str(top / "locked/new/er"), str(top / "parts")]
        done = subprocess.run([sys.executable, "-c", script, *places], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        (top / "parts/predictions").chmod(0o755)


def test_a_folder_in_use_by_another_process_is_refused_until_that_ends(tmp_path):
    script = (
        "import sys; from pathlib import Path; from mmpipe.jobs.output import claimed\n"
        "with claimed(Path(sys.argv[1]), 'new'): print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with other:
        assert other.stdout.readline() == "held\n"
        for mode in ("new", "overwrite"):
            with pytest.raises(OutputError, match="in use by another run"):
                refuse(tmp_path, mode)
        other.kill()
    assert (tmp_path / ".mmpipe.lock").exists()  # what a kill leaves behind holds nobody up
    with claimed(tmp_path, "new"):
        pass


def test_inside_sees_through_links_and_dots(tmp_path):
    (tmp_path / "media/sub").mkdir(parents=True)
    (tmp_path / "link").symlink_to("media/sub")
    (tmp_path / "loop").symlink_to("loop")
    for inside in ("media", "media/out", "link/out", "other/../media/x"):
        with pytest.raises(OutputError, match="inside the input"):
            refuse(tmp_path / inside, "overwrite", inside=tmp_path / "media")
    for beside in ("media-out", "out", "media/../out"):
        refuse(tmp_path / beside, "overwrite", inside=tmp_path / "media")
    with pytest.raises(OutputError, match=r"can't be|is a file"):
        refuse(tmp_path / "loop", "new", inside=tmp_path / "media")
