"""The command line as a user meets it: processes, exit codes, streams; never a traceback."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest
from support import words
from support.words import mmpipe

import mmpipe as package
from mmpipe import cli


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A folder with words.yaml and twenty texts."""
    folder = tmp_path_factory.mktemp("shop")
    words.config(folder, output={"shard_rows": 16, "folder": "out"}, input={"folder": "media"})
    words.texts(folder / "media", 20)
    return folder


@pytest.fixture
def here(shop, monkeypatch, capfd):
    """The command line within this process, where torch is loaded already: (exit code, standard output and error)."""

    def call(*arguments):
        monkeypatch.chdir(shop)
        monkeypatch.setattr(sys, "argv", ["mmpipe", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code or 0, *capfd.readouterr()

    return call


def test_help_version_schema_and_bad_usage(tmp_path):
    helped = mmpipe("--help", cwd=tmp_path)
    assert helped.returncode == 0
    for command in ("run", "predict", "check", "init", "pull", "schema"):
        assert f"\n  {command} " in helped.stdout
    version = mmpipe("--version", cwd=tmp_path)
    assert (version.returncode, version.stdout, version.stderr) == (0, f"mmpipe {package.__version__}\n", "")
    printed = mmpipe("schema", cwd=tmp_path)
    assert "labels" in json.loads(printed.stdout)["properties"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "Usage"),
        (["nonsense"], "nonsense"),
        (["run"], "config"),
        (["run", "nowhere.yaml"], "no such file"),
        (["run", "words.yaml", "--limit", "0"], "--limit"),
        (["run", "words.yaml", "--limit", "-3"], "--limit"),
        (["run", "words.yaml", "--limit", "few"], "--limit"),
        (["run", "words.yaml", "--mode", "resume"], "resume is not implemented yet"),
        (["run", "words.yaml", "--mode", "append"], "no such mode: 'append'"),
        (["run", "words.yaml", "--set", "nonsense"], "KEY=VALUE"),
        (["run", "words.yaml", "--set", "output.top_k=[1,"], "--set"),
        (["run", "words.yaml", "--set", "output.topk=1"], "did you mean top_k"),
        (["run", "words.yaml", "--input", "nowhere"], "no such folder"),
        (["run", "words.yaml", "--input", "empty"], "the folder is empty"),
        (["run", "words.yaml", "--input", "nowhere.csv"], "no such manifest"),
        (["check", "words.yaml", "--input", "two.csv"], "already used"),
        (["check", "words.yaml", "--set", "input={manifest: keep.csv, keep: [label]}"], "has already"),
        (["predict", "words.yaml"], "nothing to predict"),
        (["init", "nowhere"], "no such folder"),
        (["pull", "nowhere.yaml"], "no such file"),
    ],
)
def test_bad_usage_is_exit_code_2_with_the_reason_on_standard_error(shop, arguments, says):
    (shop / "empty").mkdir(exist_ok=True)
    (shop / "two.csv").write_text("id,text\na,mug\na,lamp\n")
    (shop / "keep.csv").write_text("id,text,label\na,mug,x\n")
    done = mmpipe(*arguments, cwd=shop)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert "building" not in done.stderr
    assert not (shop / "out").exists()


def test_run_puts_results_on_standard_output_and_progress_on_standard_error(shop):
    done = mmpipe("run", "words.yaml", "--output", "plain", cwd=shop)
    assert done.returncode == 0, done.stderr
    assert "Where samples were answered" in done.stdout
    assert "20 items in" in done.stdout
    assert os.path.join("plain", "report.html") in done.stdout
    assert "building words" in done.stderr
    assert "20 of 20 items" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert pq.read_table(shop / "plain/predictions").num_rows == 20


def test_run_as_json(shop, here):
    (shop / "broken").mkdir()
    (shop / "broken/a.txt").write_text("mug")
    (shop / "broken/b.txt").write_text("")
    code, results, told = here("run", "words.yaml", "--json", "--input", "broken", "--output", "json")
    assert code == 3
    run = json.loads(results)
    assert run == json.loads((shop / "json/run.json").read_text())
    assert run["status"] == {"ok": 1, "partial": 0, "failed": 1}
    events = [json.loads(line) for line in told.splitlines()]
    assert {"event": "start", "total": 2, "what": "predicting"} in events
    assert events[-1]["event"] == "note"
    assert events[-1]["text"].startswith(
        "exit code 3: 1 of 2 failed, more than input.max_failed allows (0.05); all rows"
    )
    code, results, told = here("run", "words.yaml", "--json", "--output", "json")
    assert (code, results) == (4, "")
    assert json.loads(told)["event"] == "error"


def test_max_failed_and_strict(shop, here):
    folder = words.texts(shop / "some", 19)
    (folder / "broken.txt").write_text("")
    for number, (options, expected) in enumerate([([], 0), (["--strict"], 3), (["--set", "input.max_failed=4%"], 3)]):
        code, _, told = here("run", "words.yaml", "--input", "some", "--output", f"some{number}", *options)
        assert code == expected
        assert (f"exit code {expected}: " in told) == bool(expected)


def test_outputs_are_refused_before_a_model_is_loaded(shop):
    (shop / "used").mkdir()
    (shop / "used/notes.txt").write_text("mine")
    (shop / "file").write_text("mine")
    for place, says in (("used", "not empty (notes.txt)"), ("file", "is a file"), ("media/out", "inside the input")):
        done = mmpipe("run", "words.yaml", "--output", place, cwd=shop)
        assert done.returncode == 4
        assert says in done.stderr
        assert "building" not in done.stderr
    assert [path.name for path in (shop / "used").iterdir()] == ["notes.txt"]


def test_a_model_that_fails_is_exit_code_1(shop, here):
    (shop / "failing").mkdir()
    (shop / "failing/a.txt").write_text("out of range")
    code, results, told = here("run", "words.yaml", "--input", "failing", "--output", "failing-out")
    assert (code, results) == (1, "")
    assert "mmpipe: segment text@0 failed: IndexError" in told


@pytest.mark.parametrize("arguments", [["schema"], ["check", "words.yaml", "--input", "media"]])
def test_a_reader_that_goes_away_is_no_error(shop, arguments):
    command = [sys.executable, "-m", "mmpipe", *arguments]
    with subprocess.Popen(command, cwd=shop, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        errors = process.stderr.read()
    assert (process.returncode, errors) == (0, "")


def test_a_run_whose_reader_goes_away_ends_as_it_would_have(shop, here, monkeypatch):
    (shop / "half").mkdir()
    (shop / "half/a.txt").write_text("")
    for number, option in enumerate(["--json", "--strict"]):
        reader, writer = os.pipe()
        os.close(reader)
        with os.fdopen(writer, "w") as gone:
            monkeypatch.setattr(sys, "stdout", gone)
            code, _, told = here("run", "words.yaml", "--input", "half", "--output", f"half{number}", option)
        assert code == 3
        assert "Broken" not in told


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
@pytest.mark.parametrize("arguments", [["schema"], ["--help"], ["check", "words.yaml", "--input", "media"]])
def test_results_that_can_not_be_written_are_told_in_a_line(shop, arguments):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "mmpipe", *arguments]
        done = subprocess.run(command, cwd=shop, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "mmpipe: standard output: No space left on device\n")


def test_output_that_can_not_show_a_character_shows_its_number(shop):
    (shop / "wide").mkdir()
    (shop / "wide/größe 靴.txt").write_text("mug")
    done = mmpipe(
        "check", "words.yaml", "--input", "wide", cwd=shop, PYTHONUTF8="0", PYTHONIOENCODING="ascii", LC_ALL="C"
    )
    assert done.returncode == 0, done.stderr
    assert "gr\\xf6" in done.stdout


def test_check_pairs_counts_and_shows_five_items_and_every_file_that_is_in_none(shop):
    folder = words.texts(shop / "listed", 7)
    (folder / "b\x1b[31m.jpg").write_bytes(b"x")
    (folder / "[red]c.pdf").write_bytes(b"x")
    for number in range(300):
        (folder / str(number)).mkdir()
        (folder / str(number) / ".DS_Store").write_bytes(b"x")
    done = mmpipe("check", "words.yaml", "--input", "listed", cwd=shop)
    assert done.returncode == 0
    assert "words.yaml: the configuration is valid" in done.stdout
    assert "7 items: 7 with text" in done.stdout
    assert [f"{number:05d}.txt" in done.stdout for number in range(7)] == [True] * 5 + [False] * 2
    assert "302 files belong to no item" in done.stdout
    assert "b\\x1b[31m.jpg: no encoder for image in this configuration" in done.stdout
    assert "[red]c.pdf: unknown suffix .pdf" in done.stdout
    assert [f"{number}/.DS_Store: hidden" in done.stdout for number in range(300)] == [True] * 300
    assert "\x1b" not in done.stdout


def test_every_media_file_that_is_in_no_item_is_shown(shop):
    folder = words.texts(shop / "many", 1)
    for number in range(400):
        (folder / f"{number:03d}.jpg").write_bytes(b"x")
    done = mmpipe("check", "words.yaml", "--input", "many", cwd=shop)
    assert all(f"\n  {number:03d}.jpg: no encoder" in done.stdout for number in range(400))


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["schema"], ["check"], ["init"], ["refused"]])
def test_what_needs_no_model_imports_no_torch(shop, tmp_path, arguments):
    given = {
        "check": ["check", "words.yaml", "--input", "media"],
        "init": ["init", "media", "--output", str(tmp_path / "x.yaml")],
        "refused": ["run", "words.yaml", "--output", "media"],
    }.get(arguments[0], arguments)
    script = (
        "import sys; sys.argv[0] = 'mmpipe'\nfrom mmpipe.cli import main\n"
        "try: main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script, *given], cwd=shop, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_init_then_check(tmp_path):
    folder = words.texts(tmp_path / "my media", 3)
    begun = mmpipe("init", folder, cwd=tmp_path)
    assert begun.returncode == 0, begun.stderr
    assert "3 items: 3 with text" in begun.stdout
    assert "mmpipe run '" in begun.stdout  # a path with a space, ready to be pasted
    checked = mmpipe("check", folder / "mmpipe.yaml", cwd=tmp_path)
    assert checked.returncode == 0
    assert "note: the labels are still those that init wrote" in checked.stdout
    named = mmpipe("check", folder / "mmpipe.yaml", "--set", "labels=[first label, mine]", cwd=tmp_path)
    assert "note:" not in named.stdout
    again = mmpipe("init", folder, cwd=tmp_path)
    assert again.returncode == 4
    assert "exists" in again.stderr


def test_predict(shop, here):
    (shop / "one.txt").write_text("item 1")
    printed = [here("predict", "words.yaml", "--text", text) for text in ("item 1", "@one.txt")]
    assert [(code, told) for code, _, told in printed] == [(0, ""), (0, "")]
    first, second = (json.loads(results) for _, results, _ in printed)
    assert first == second
    assert first["label"] in words.LABELS
    assert first["top_k"][0] == {"label": first["label"], "probability": pytest.approx(first["confidence"])}
    (shop / "empty.txt").touch()
    code, results, _ = here("predict", "words.yaml", "--text", "@empty.txt")
    assert code == 1
    assert json.loads(results)["error"] == "text:empty: empty.txt: 0 bytes"


def test_ctrl_c_on_a_terminal_with_a_bar(tmp_path):
    """A real terminal: a bar with rate and time left, then Ctrl-C; the results so far stay."""
    words.config(tmp_path, seconds=0.05)
    words.texts(tmp_path / "media", 400)
    pid, terminal = pty.fork()
    if pid == 0:
        command = [sys.executable, "-m", "mmpipe", "run", "words.yaml", "--input", "media", "--output", "out"]
        os.chdir(tmp_path)
        os.execve(sys.executable, command, {**os.environ, "TERM": "xterm", "COLUMNS": "80"})
    shown, deadline, pressed = b"", time.monotonic() + 90, False
    while time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.2)[0]:
            try:
                shown += os.read(terminal, 65536)
            except OSError:  # its end has been closed
                break
        if not pressed and (tmp_path / "out/predictions/part-00001.parquet").exists():
            os.write(terminal, b"\x03")
            pressed = True
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
    text = shown.decode()
    assert "predicting" in text
    assert "/400" in text
    assert "/s" in text
    assert "Traceback" not in text
    assert "interrupted" in text
    run = json.loads((tmp_path / "out/run.json").read_text())
    assert run["interrupted"] is True
    assert run["rows"] == pq.read_table(tmp_path / "out/predictions").num_rows > 16


def test_predict_of_a_file_that_is_not_there_is_bad_usage(here):
    code, results, told = here("predict", "words.yaml", "--image", "nope.jpg", "--text", "mug")
    assert (code, results) == (2, "")
    assert "--image: 'nope.jpg': there is no such file" in told
    code, results, told = here("predict", "words.yaml", "--text", "@nope.txt")
    assert (code, results) == (2, "")
    assert "--text: 'nope.txt': there is no such file" in told


def test_columns_of_a_table_that_is_given_on_the_command_line(here, shop):
    """`keep` without a manifest is refused where a folder is read, not where a table is."""
    (shop / "items.csv").write_text("id,text,price\none,a red shoe,5\ntwo,a blue bag,6\n", encoding="utf-8")
    code, _, told = here("check", "words.yaml", "--set", "input.keep=[price]")
    assert code == 2
    assert "input.keep: keep is for a manifest, and there is none" in told
    run = ("run", "words.yaml", "--output", "kept", "--set")
    assert here(*run, "input.keep=[price]", "--input", "items.csv")[0] == 0
    assert pq.read_table(shop / "kept" / "predictions")["price"].to_pylist() == ["5", "6"]


def test_a_job_on_the_command_line_is_decided_for_as_many_samples_as_it_has(here, monkeypatch):
    """As `run_folder` does: what is worth measuring or waiting for depends on it."""
    from mmpipe.runners import Runners

    seen, settle = [], Runners.settle
    monkeypatch.setattr(
        Runners, "settle", lambda self, samples, limits: seen.append(len(samples)) or settle(self, samples, limits)
    )
    assert here("run", "words.yaml", "--output", "settled", "--limit", "7")[0] == 0
    assert seen == [7]
