"""Segments in OpenVINO, in float32 and in bfloat16."""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import replace

import pytest
import torch
from support import hub
from support.lowering import ROWS, TOLERANCE, case_of, error, family, packaged, permuted_alike
from torch import nn

from mmpipe.graphs.backends import Target, Unlowerable, lower
from mmpipe.graphs.backends.spectrum import split
from mmpipe.graphs.capture import capture

openvino = pytest.importorskip("openvino")
CAPABLE = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
bfloat16 = pytest.mark.skipif("BF16" not in CAPABLE, reason="this CPU has no bfloat16 units")


def lowered(case, **target):
    return lower("openvino", case.segment, case.module, Target(len(case.inputs[0]), **target), case.inputs)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return hub.Models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def quickstart():
    return packaged("quickstart")


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("kept")


class Wide(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(width, width)

    def forward(self, x):
        for _ in range(4):
            x = torch.tanh(self.inner(x))
        return (x,)


@pytest.mark.parametrize("name", ["open_clip", "siglip", "bert", "mpnet", "clap", "whisper"])
def test_architectures_are_what_eager_computes_and_keep_a_rows_bits(models, name):
    case = family(models, name)
    run = lowered(case)
    assert error(run(*case.inputs), case.eager()) <= TOLERANCE
    assert permuted_alike(run, case)


def test_every_segment_of_the_quickstart_with_every_mix_of_modalities(quickstart, kept):
    for case in quickstart.values():
        assert error(lowered(case, folder=kept)(*case.inputs), case.eager()) <= TOLERANCE


@bfloat16
def test_bfloat16_is_near_and_keeps_a_rows_bits(quickstart, kept):
    for case in quickstart.values():
        run = lowered(case, folder=kept, dtype=torch.bfloat16)
        if "audio" in case.segment.name:
            t_s = torch.arange(case.inputs[0].shape[1]) / 16000
            tones = torch.stack([torch.sin(6.28 * (300 + 200 * row) * t_s) for row in range(ROWS)])
            found, wanted = run(tones * 0.3)[0], case.eager(tones * 0.3)[0]
        else:
            found, wanted = run(*case.inputs)[0], case.eager()[0]
        assert float(torch.cosine_similarity(found, wanted).min()) > 0.998
        assert not torch.equal(found, wanted)
        assert permuted_alike(run, case)


def test_float32_is_float32_where_openvino_would_choose_another():
    case = case_of(Wide(256), torch.randn(4, 256))
    assert error(lowered(case)(*case.inputs), case.eager()) <= 1e-6


class Spectrum(nn.Module):
    """A quiet sound beside a loud one, as a logarithm shows it, and what a network makes of that."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.bands = nn.Linear(64, 64), nn.Linear(64, 64, bias=False)

    def forward(self, x):
        log_mel = torch.log10(self.bands(x).square() + 1e-6)
        return log_mel, torch.log(nn.functional.layer_norm(self.inner(log_mel), [64]).square() + 1)


@bfloat16
def test_a_log_spectrum_is_computed_in_float32_whatever_the_type():
    x = torch.randn(4, 64) * torch.logspace(0, -3, 4)[:, None]
    module = capture(Spectrum(), {"x": x[0]}, name="audio").graph
    case = replace(case_of(Wide(), x), module=module)
    (found, last), (wanted, last_wanted) = lowered(case, dtype=torch.bfloat16)(x), case.eager()
    assert error((found,), (wanted,)) <= TOLERANCE
    assert 1e-4 < error((last,), (last_wanted,)) < 3e-2


def test_a_spectrum_is_what_comes_before_the_first_logarithm(quickstart):
    for case in quickstart.values():
        parts = split(case.module)
        assert (parts is not None) == case.segment.name.startswith("audio")
        if parts is not None:
            front, rest = parts
            found = rest(*case.inputs, *front(*case.inputs))
            assert all(torch.equal(one, other) for one, other in zip(found, case.eager(), strict=True))
            assert str(list(front.graph.nodes)[-2].target) == "aten.log10.default"
            assert not any("log" in str(node.target) for node in rest.graph.nodes if node.op == "call_function")


def test_calls_from_two_threads_do_not_mix():
    case = case_of(Wide(), torch.randn(4, 8))
    run = lowered(case)
    wrong = []

    def call(seed):
        make = torch.Generator().manual_seed(seed)
        for _ in range(200):
            x = torch.randn(4, 8, generator=make)
            if error(run(x), case.eager(x)) > TOLERANCE:
                wrong.append(seed)

    threads = [threading.Thread(target=call, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("threads", [1, 2])
def test_it_computes_on_the_threads_it_was_given(threads):
    case = case_of(Wide(1024), torch.randn(512, 1024))
    run = lowered(case, threads=threads)
    run(*case.inputs)
    all_s, mine_s = time.process_time(), time.thread_time()
    for _ in range(20):
        run(*case.inputs)
    all_s, mine_s = time.process_time() - all_s, time.thread_time() - mine_s
    assert (all_s > 1.1 * mine_s) == (threads > 1)


class Types(nn.Module):
    """Every type that a pipeline's inputs have; and one input that is read for its size alone."""

    def forward(self, sized, pixels, ids, present):
        y = pixels.float() + ids[:, None] + torch.zeros((sized.shape[0], 1))
        return torch.where(present[:, None], y, torch.zeros_like(y)), ids + 1, present


def test_types_are_the_segments_own():
    pixels = torch.randint(0, 256, (4, 3), dtype=torch.uint8)
    case = case_of(Types(), torch.zeros(4, 2), pixels, torch.arange(4) * 2**20, torch.arange(4) % 2 == 1)
    assert error(lowered(case)(*case.inputs), case.eager()) == 0


def test_inputs_may_be_views_of_a_pool_and_change():
    case = case_of(Wide(), torch.randn(4, 8))
    run, pool = lowered(case), torch.randn(3, 4, 8)
    assert error(run(pool[1]), case.eager(pool[1])) <= TOLERANCE
    pool[1] = torch.randn(4, 8)
    assert error(run(pool[1]), case.eager(pool[1])) <= TOLERANCE


# --- what it can't do -------------------------------------------------------------------------------------------------


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(Unlowerable, match=r'openvino is not installed: pip install "mmpipe\[openvino\]"'):
        lowered(case_of(Wide(), torch.randn(4, 8)))


def test_another_type_is_refused():
    with pytest.raises(Unlowerable, match=r"image@0: OpenVINO computes in float32 or bfloat16, not in torch.float16"):
        lowered(case_of(Wide(), torch.randn(4, 8)), dtype=torch.float16)


def test_bfloat16_is_refused_where_the_cpu_has_none(monkeypatch):
    plain = openvino.Core.get_property

    def without(core, device, name):
        return ["FP32"] if name == "OPTIMIZATION_CAPABILITIES" else plain(core, device, name)

    monkeypatch.setattr(openvino.Core, "get_property", without)
    with pytest.raises(Unlowerable, match=r"image@0: this CPU has no bfloat16 units that OpenVINO could use"):
        lowered(case_of(Wide(), torch.randn(4, 8)), dtype=torch.bfloat16)


def test_what_was_exported_is_exported_once(tmp_path, monkeypatch):
    case = case_of(Wide(), torch.randn(4, 8))
    wanted = lowered(case, folder=tmp_path)(*case.inputs)
    monkeypatch.delattr(torch.onnx, "export")
    assert torch.equal(lowered(case, folder=tmp_path)(*case.inputs)[0], wanted[0])
