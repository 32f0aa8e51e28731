"""Segments in the ONNX Runtime, whose export OpenVINO and TensorRT take too."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest
import torch
from support import hub
from support.lowering import TOLERANCE, Small, case_of, error, family, packaged, permuted_alike, small
from torch import nn

from mmpipe.graphs.backends import Target, Unlowerable, export, lower
from mmpipe.graphs.plan import GraphError


def lowered(case, **target):
    return lower("onnx", case.segment, case.module, Target(len(case.inputs[0]), **target), case.inputs)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return hub.Models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def quickstart():
    return packaged("quickstart")


@pytest.mark.parametrize("name", hub.FAMILIES)
def test_every_architecture_is_what_eager_computes_and_keeps_a_rows_bits(models, name):
    case = family(models, name)
    run = lowered(case)
    assert error(run(*case.inputs), case.eager()) <= TOLERANCE
    assert permuted_alike(run, case)


def test_every_segment_of_the_quickstart_with_every_mix_of_modalities(quickstart):
    assert len(quickstart) == 6
    for case in quickstart.values():
        assert error(lowered(case)(*case.inputs), case.eager()) <= TOLERANCE


def test_what_is_masked_changes_nothing(quickstart):
    case = quickstart["text@1"]
    run = lowered(case)
    pieces, mask = case.inputs
    other = torch.where(mask[:, :, None].bool(), pieces, torch.randint_like(pieces, 1, 50))
    assert not torch.equal(pieces, other)
    assert error(run(other, mask), run(pieces, mask)) <= TOLERANCE
    assert error(run(other, torch.ones_like(mask)), run(pieces, mask)) > 1e-2


def test_results_outlive_other_calls_and_threads():
    case = small()
    run = lowered(case)
    batches = [torch.randn(4, 6) for _ in range(16)]
    found = {}

    def call(places):
        for place in places:
            found[place] = run(batches[place])

    threads = [threading.Thread(target=call, args=(range(start, 16, 2),)) for start in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(error(found[place], case.eager(batch)) <= TOLERANCE for place, batch in enumerate(batches))


class Odd(nn.Module):
    """Reads one input for its size alone, gives one value twice, and hands one input on."""

    def forward(self, sized, x):
        y = x + torch.zeros((sized.shape[0], 1))
        return y, y, x


def test_an_input_may_be_read_for_its_size_and_an_output_be_given_twice():
    case = case_of(Odd(), torch.ones(4, 2, dtype=torch.bool), torch.randn(4, 3))
    assert error(lowered(case)(*case.inputs), case.eager()) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="counts a process's threads")
@pytest.mark.parametrize("threads", [1, 3])
def test_a_session_has_the_threads_it_was_given(threads):
    def count():
        return len(list(Path("/proc/self/task").iterdir()))

    case = small()
    export.onnx_of(case.segment, case.module, Target(4), case.inputs)  # starts threads of its own
    before = count()
    run = lowered(case, threads=threads)
    assert count() - before == threads - 1  # the caller's is one of them
    assert len(run(*case.inputs)) == 1


# --- what it can't do -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", ["onnxruntime", "onnx", "onnxscript"])
def test_a_missing_package_is_named_with_its_extra(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(Unlowerable, match=rf'{package} is not installed: pip install "mmpipe\[onnx\]"'):
        lowered(small())


def test_it_computes_in_float32_only():
    with pytest.raises(Unlowerable, match=r"image@0: the ONNX Runtime computes in float32 on a CPU, not in torch.bf"):
        lowered(small(), dtype=torch.bfloat16)


class Bessel(nn.Module):
    def forward(self, x):
        return (torch.ops.aten.special_bessel_j0.default(x),)


def test_an_operation_without_a_form_in_onnx_is_named(capfd):
    with pytest.raises(Unlowerable, match=r"image@0 has no form in ONNX: .*bessel_j0"):
        lowered(case_of(Bessel(), torch.randn(4, 3)))
    assert capfd.readouterr() == ("", "")


def test_weights_that_no_file_holds_are_refused(monkeypatch):
    monkeypatch.setattr(export, "_LIMIT_BYTES", 80)  # 21 float32
    with pytest.raises(Unlowerable, match=r"image@0: 0.0 GB of weights; an ONNX file holds 2 GB"):
        lowered(small())


def test_examples_of_other_rows_are_refused():
    case = small()
    with pytest.raises(GraphError, match="needs an example of 5 rows for each of its 1 inputs"):
        lower("onnx", case.segment, case.module, Target(5), case.inputs)


# --- what is kept -----------------------------------------------------------------------------------------------------


@pytest.fixture
def exports(monkeypatch):
    """How often something was exported."""
    counted = []
    plain = torch.onnx.export
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **kwargs: counted.append(1) or plain(*args, **kwargs))
    return counted


def test_what_was_exported_is_exported_once(tmp_path, exports):
    case = small()
    wanted = case.eager()
    for _ in range(2):
        assert error(lowered(case, folder=tmp_path)(*case.inputs), wanted) <= TOLERANCE
    assert len(exports) == 1
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("changed", ["weights", "rows", "type"])
def test_what_differs_is_exported_anew(tmp_path, exports, changed):
    one = small()
    inputs = {"weights": one.inputs, "rows": (torch.randn(5, 6),), "type": (torch.randn(4, 6).double(),)}[changed]
    other = case_of(Small(1) if changed == "weights" else Small(), *inputs)
    if changed == "type":
        other.module.double()
    assert error(lowered(one, folder=tmp_path)(*one.inputs), one.eager()) <= TOLERANCE
    assert error(lowered(other, folder=tmp_path)(*inputs), other.eager(*inputs)) <= TOLERANCE
    assert len(exports) == 2


def test_a_broken_file_is_made_anew(tmp_path, exports):
    case = small()
    lowered(case, folder=tmp_path)
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    assert error(lowered(case, folder=tmp_path)(*case.inputs), case.eager()) <= TOLERANCE
    assert len(exports) == 2
    assert path.read_bytes() != content
