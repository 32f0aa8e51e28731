"""The built wheel in a clean place: nothing lost, nothing stray, and the first command works from it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile

import pytest
from house import ROOT, build_wheel, unpack

pytestmark = pytest.mark.wheel

QUICKSTART_LIMIT_BYTES = 15_000_000


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def place(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    unpack(wheel, folder)
    return folder


def run(place, *arguments, cwd):
    """A Python that finds mmpipe in the unpacked wheel, from outside the checkout."""
    environment = {**os.environ, "PYTHONPATH": str(place), "PYTHONSAFEPATH": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


def test_everything_that_is_tracked_is_in_it_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert all(name.startswith("mmpipe/") for name in names)
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    for folder in ("mmpipe", "graphs", "encoders", "fusion", "configs"):
        for name in listed:
            if name.startswith(f"{folder}/"):
                assert (name if folder == "mmpipe" else f"mmpipe/{name}") in names, name


def test_the_demo_is_small(wheel):
    sizes = [entry.file_size for entry in zipfile.ZipFile(wheel).infolist() if "/configs/quickstart/" in entry.filename]
    assert 0 < sum(sizes) <= QUICKSTART_LIMIT_BYTES


def test_licences_come_along(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert any(name.endswith("licenses/NOTICE") for name in names)
    assert "mmpipe/configs/quickstart/FASHION-MNIST-LICENSE.txt" in names


def test_the_first_command_works_from_it(place, tmp_path):
    where = run(place, "-c", "import mmpipe.graphs; print(mmpipe.graphs.__file__)", cwd=tmp_path)
    assert where.stdout.startswith(str(place)), where.stderr
    done = run(place, "-m", "mmpipe", "run", "quickstart", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Where samples were answered" in done.stdout
    report = json.loads((tmp_path / "out" / "quickstart" / "run.json").read_text(encoding="utf-8"))
    assert report["rows"] == 62
    assert report["status"] == {"ok": 60, "partial": 1, "failed": 1}


def test_importing_and_asking_for_help_bring_no_torch(place, tmp_path):
    for code in (
        "import mmpipe, sys",
        "import sys; sys.argv[1:] = ['--help']\nfrom mmpipe.cli import main\ntry: main()\nexcept SystemExit: pass",
        "import sys\nfrom mmpipe.config import load\nload('clip_clap')",
    ):
        done = run(place, "-c", code + "\nassert 'torch' not in sys.modules, 'torch was imported'", cwd=tmp_path)
        assert done.returncode == 0, done.stderr


def test_no_name_outside_mmpipe_is_taken(wheel):
    top = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith("top_level.txt")]
    assert zipfile.ZipFile(wheel).read(top[0]).decode().split() == ["mmpipe"]
