"""The example that weighs a job's memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support import examples

from mmpipe import configs

DEMO = Path(configs.__file__).parent / "quickstart" / "media"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what processes share")


@pytest.fixture(scope="module")
def memory():
    return examples.load("memory")


def test_what_a_process_and_its_children_take_is_counted_once(memory):
    takes = "import subprocess, sys, time; kept = bytearray(80_000_000); {}; time.sleep(1)"
    child = f"subprocess.run([sys.executable, '-c', {takes.format('0')!r}])"
    one, _ = memory.peak([sys.executable, "-c", takes.format("0")])
    two, _ = memory.peak([sys.executable, "-c", takes.format(child)])
    forked = "import os, time; kept = bytearray(80_000_000); os.fork(); time.sleep(1)"
    shared, _ = memory.peak([sys.executable, "-c", forked])
    assert 80e6 < one < 120e6
    assert 160e6 < two < 240e6
    assert 80e6 < shared < 120e6


def test_a_run_that_fails_is_no_figure(memory):
    with pytest.raises(subprocess.CalledProcessError):
        memory.peak([sys.executable, "-c", "raise SystemExit(3)"])


def test_a_folder_is_made_of_links(memory, tmp_path):
    memory.links(DEMO, tmp_path / "many", 150)
    names = sorted(path.stem for path in (tmp_path / "many").iterdir())
    assert (names[0], names[-1]) == ("item-0000000", "item-0000149")
    assert all(path.is_file() for path in (tmp_path / "many").iterdir())


def test_on_the_demo(memory, capsys):
    assert memory.main(["quickstart", str(DEMO), "--items", "70", "--set", "runtime.processes=1"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("import torch alone: ")
    (figures,) = told[4:]
    items, processes, _, plan, allowed, peak, files = (cell.strip() for cell in figures.strip("|").split("|"))
    assert (items, processes) == ("70", "1")
    numbers = [float(cell.replace(",", "")) for cell in (plan, allowed, peak, files)]
    assert numbers[1] == numbers[0] + 300
    assert 200 < numbers[2] < 2000
    assert numbers[3] < numbers[2]
