"""`mmpipe doctor`: what there is, what is missing and what is broken, each with what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mmpipe import doctor
from mmpipe.cli import app


def found(*arguments: str) -> tuple[dict[str, tuple[str, str]], int]:
    done = CliRunner().invoke(app, ["doctor", "--json", *arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit)
    return {one["about"]: (one["state"], one["told"]) for one in json.loads(done.stdout)}, done.exit_code


def test_this_machine_is_told_of(cache: Path) -> None:
    about, code = found()
    assert code == 0, about
    assert {"processor", "memory", "GPU", "C++ compiler", "native code", "cache", "hub"} < set(about)
    assert about["cache"] == ("has", about["cache"][1])
    assert str(cache) in about["cache"][1]
    assert about["soundfile"][0] == "has"
    lines = CliRunner().invoke(app, ["doctor"]).stdout.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("✓ processor")] == ["processor"]
    assert all(line[0] in "✓–!" for line in lines)


def test_what_is_not_installed_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = doctor.util.find_spec
    missing = ("openvino", "soxr")
    monkeypatch.setattr(doctor.util, "find_spec", lambda name: None if name in missing else find_spec(name))
    about, code = found()
    told = "not installed, for runtime.backend: openvino: pip install 'mmpipe[openvino]'"
    assert about["openvino"] == ("without", told)
    assert about["soxr"][0] == "lacks"  # mmpipe itself needs it
    assert code == 1


def test_what_is_broken_is_named_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shaky.py").write_text("raise RuntimeError('operator shaky::nms does not exist')")
    (tmp_path / "deadly.py").write_text("import os; os._exit(7)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    packages = [(name, name, "av", "sounds") for name in ("shaky", "deadly", "av")]
    monkeypatch.setattr(doctor, "_PACKAGES", packages)
    about, code = found()
    assert about["shaky"][0] == about["deadly"][0] == "lacks"
    assert "can't be imported (operator shaky::nms does not exist): pip install 'mmpipe[av]'" in about["shaky"][1]
    assert "its import ends the process, code 7" in about["deadly"][1]
    assert about["av"][0] == "has"  # what comes after it is looked at all the same
    assert code == 1


def test_a_cache_that_can_not_be_written_or_is_off(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write_text("a file where a folder has to be")
    about, code = found()
    assert about["cache"][0] == "lacks"
    assert "can't be written to" in about["cache"][1]
    assert code == 1
    monkeypatch.setenv("MMPIPE_CACHE", "off")
    assert found()[0]["cache"][0] == "without"


def test_hidden_instructions_no_compiler_and_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.machine, "bfloat16_gain", lambda: 0.0)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_TOKEN", "a secret")
    about, code = found()
    assert "no bfloat16: float32 is used" in about["processor"][1]
    assert about["C++ compiler"][0] == "without"
    assert "offline: only models that are there; a token" in about["hub"][1]
    assert "a secret" not in str(about)
    assert code == 0


def test_a_gpu_that_pytorch_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "cuda_devices", lambda: 0)
    monkeypatch.setattr(doctor.Path, "exists", lambda self: True)
    assert doctor._gpu().state == "lacks"
    assert "update its driver" in doctor._gpu().told
