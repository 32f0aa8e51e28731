"""Segments compiled by Inductor, and the folder that they are kept in."""

from __future__ import annotations

import shutil
import threading
import time

import pytest
import torch
from torch import nn

from mmpipe.graphs.backends import Target, Unlowerable, examples_of, lower
from mmpipe.graphs.backends.sealed import Sealed
from mmpipe.graphs.capture import capture
from mmpipe.graphs.cut import cut
from mmpipe.graphs.fuse import fuse

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def made():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 4)).eval()

    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, x):
            return self.inner(x)

    return cut(fuse([capture(One(), {"x": torch.zeros(8)}, name="image")], None, []))


def lower_with(made, folder, rows=4, dtype=torch.float32, backend="inductor"):
    segment = made.plan.segments[0]
    target = Target(rows, dtype, threads=1, folder=folder)
    return lower(backend, segment, made.modules[segment.name], target, examples_of(made.plan, segment, rows))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_computes_what_eager_does(made, tmp_path, dtype):
    x = torch.randn(4, 8)
    with torch.inference_mode():
        (want,), (got,) = (
            lower_with(made, None, dtype=dtype, backend="eager")(x),
            lower_with(made, tmp_path, 4, dtype)(x),
        )
        assert got.dtype == torch.float32
        assert (got - want).abs().max() <= (1e-6 if dtype == torch.float32 else 2e-2) * want.abs().max()
        order = torch.tensor([2, 0, 3, 1])
        again = lower_with(made, tmp_path, 4, dtype)(x[order])[0]
        assert torch.equal(again, got[order])


@needs_compiler
def test_what_was_compiled_is_kept_and_what_somebody_touched_is_not_loaded(made, tmp_path, monkeypatch):
    lower_with(made, tmp_path)
    (place,) = (path for path in tmp_path.iterdir() if path.is_dir())
    sealed = Sealed(tmp_path, place.name)
    assert sealed.known
    code = next(path for path in place.rglob("*") if path.suffix in (".so", ".cpp", ".py"))
    code.chmod(0o600)
    code.write_bytes(code.read_bytes() + b"\n")
    assert not sealed.known
    assert not place.exists()  # all of it is gone, and made anew
    x = torch.randn(4, 8)
    with torch.inference_mode():
        want = lower_with(made, None, backend="eager")(x)[0]
        assert torch.allclose(lower_with(made, tmp_path)(x)[0], want, atol=1e-6)
    assert sealed.known


def test_without_a_compiler_it_says_what_is_missing(made, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(Unlowerable, match=r"needs a C\+\+ compiler"):
        lower_with(made, None)


def test_a_folder_that_others_can_write_is_refused(tmp_path):
    tmp_path.chmod(0o777)
    with pytest.raises(PermissionError, match="somebody else"), Sealed(tmp_path, "one"):
        pass


@needs_compiler
def test_where_nothing_can_be_kept_it_is_compiled_for_this_time(made, tmp_path):
    tmp_path.chmod(0o777)
    x = torch.randn(4, 8)
    with torch.inference_mode():
        want = lower_with(made, None, backend="eager")(x)[0]
        with pytest.warns(RuntimeWarning, match="not kept.*somebody else"):
            run = lower_with(made, tmp_path)
        assert torch.allclose(run(x)[0], want, atol=1e-6)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_costs_the_artefact_alone(tmp_path, monkeypatch):
    def full(self, text, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with Sealed(tmp_path / "kept", "one") as sealed:
        (sealed.place / "code").write_bytes(b"whole")
    assert not Sealed(tmp_path / "kept", "one").known


def test_who_compiles_the_same_waits_and_finds_it(tmp_path):
    began, order = threading.Event(), []

    def other():
        began.wait()
        with Sealed(tmp_path / "kept", "one") as sealed:
            order.append((sealed.place / "code").read_text())

    thread = threading.Thread(target=other)
    thread.start()
    with Sealed(tmp_path / "kept", "one") as sealed:
        began.set()
        time.sleep(0.2)
        order.append("written")
        (sealed.place / "code").write_text("whole")
    thread.join(10)
    assert order == ["written", "whole"]


def test_half_an_artefact_is_no_artefact(tmp_path):
    def write_half():
        with Sealed(tmp_path / "kept", "one") as sealed:
            (sealed.place / "code").write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    assert not Sealed(tmp_path / "kept", "one").known
    with Sealed(tmp_path / "kept", "one") as sealed:
        (sealed.place / "code").write_text("whole")
    assert Sealed(tmp_path / "kept", "one").known
