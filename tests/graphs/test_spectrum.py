"""From a waveform to its log spectrum: cut from the rest, a few rows at a time, as matrix products."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from support.lowering import Case, permuted_alike
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mmpipe.encoders.mel import DecibelMel, MelPower, MelSettings
from mmpipe.graphs import passes
from mmpipe.graphs.backends import Target, lower
from mmpipe.graphs.backends.spectrum import as_products, split
from mmpipe.graphs.capture import capture
from mmpipe.graphs.cut import cut
from mmpipe.graphs.fuse import fuse

aten = torch.ops.aten
SOUND = 1600
MEL = MelSettings(16000, 400, 160, 40, 50.0, 7000.0, "slaney", True)


class Hears(nn.Module):
    """Log-mel, a learned product, the mean over time."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.mel, self.out = DecibelMel(MEL), nn.Linear(40, 32)

    def forward(self, sound):
        return self.out(self.mel(sound)[:, 0] / 20).mean(1)


def segment_of(module, **inputs):
    graph = fuse([capture(module.eval(), inputs or {"sound": torch.zeros(SOUND)}, name="audio")], None, [])
    passes.optimise(graph)
    made = cut(graph)
    (segment,) = made.plan.segments
    return segment, made.modules[segment.name]


def sounds(rows):
    return torch.randn(rows, SOUND, generator=torch.Generator().manual_seed(rows)) * 0.1


class Counted(TorchDispatchMode):
    """How often each operation runs, and on how many rows."""

    def __init__(self):
        super().__init__()
        self.rows = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is aten.log10.default:
            self.rows[result.shape[0]] += 1
        return result


# --- a few rows at a time ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 7, 8, 11])
def test_bands_of_rows_compute_what_all_at_once_would(rows, dtype):
    segment, module = segment_of(Hears())
    run = lower("eager", segment, module, Target(rows, dtype))
    with torch.inference_mode():
        (want,), (got,) = module(sounds(rows)), run(sounds(rows))
    assert got.shape == want.shape
    assert (got - want).abs().max() <= (1e-5 if dtype == torch.float32 else 2**-6) * want.abs().max()


@pytest.mark.parametrize("rows", [3, 8, 10])
def test_no_more_rows_than_a_band_and_each_band_has_as_many(rows):
    segment, module = segment_of(Hears())
    run = lower("eager", segment, module, Target(rows))
    with torch.inference_mode(), Counted() as counted:
        run(sounds(rows))
    assert counted.rows == {min(rows, 4): -(-rows // 4)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_s_bits_depend_on_its_sample_alone(dtype):
    segment, module = segment_of(Hears())
    case = Case(segment, module, (sounds(8),))
    assert permuted_alike(lower("eager", segment, module, Target(8, dtype)), case)


@pytest.mark.parametrize("rows", [5, 6, 7, 9])
def test_nor_on_its_place_where_the_last_band_is_not_full(rows):
    segment, module = segment_of(Hears())
    run, x = lower("eager", segment, module, Target(rows)), sounds(rows)
    with torch.inference_mode():
        (want,) = run(x)
        for shift in range(1, rows):
            assert torch.equal(run(x.roll(shift, 0))[0], want.roll(shift, 0))


class Pieces(Hears):
    """Two pieces of a sound, one after the other in dimension 0: what the rest gets is 2 × batch."""

    def forward(self, sound):
        return super().forward(sound.reshape(-1, SOUND // 2)).reshape(sound.shape[0], -1)


@pytest.mark.parametrize("rows", [3, 6, 7])
def test_values_of_several_rows_a_sample_are_put_together_again(rows):
    segment, module = segment_of(Pieces())
    with torch.inference_mode():
        (want,) = module(sounds(rows))
        (got,) = lower("eager", segment, module, Target(rows))(sounds(rows))
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


class TimeFirst(Hears):
    """Its spectrum is [frame, batch, mel]: no rows to cut."""

    def forward(self, sound):
        log = torch.log10(self.mel.power(sound).transpose(0, 1).contiguous() + 1e-6)
        return self.out(log).mean(0)


@pytest.mark.parametrize("rows", [3, 6])
def test_values_without_the_batch_first_are_not_cut(rows):
    segment, module = segment_of(TimeFirst())
    with torch.inference_mode():
        (want,) = module(sounds(rows))
        (got,) = lower("eager", segment, module, Target(rows))(sounds(rows))
    assert got.shape == want.shape
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_another_device_has_no_bands():
    segment, module = segment_of(Hears())
    with FakeTensorMode(allow_non_fake_inputs=True):
        for name, tensor in list(module.named_buffers()):
            path, _, last = name.rpartition(".")
            module.get_submodule(path).register_buffer(last, torch.empty_like(tensor, device="cuda"))
        run = lower("eager", segment, module, Target(8))
        with Counted() as counted:
            (found,) = run(torch.empty(8, SOUND, device="cuda"))
    assert counted.rows == {8: 1}
    assert found.device.type == "cuda"


def test_what_takes_no_logarithm_of_a_waveform_is_one_part():
    _segment, module = segment_of(nn.Linear(32, 16), input=torch.zeros(32))
    assert split(module) is None


# --- as matrix products -----------------------------------------------------------------------------------------------


def test_a_transform_as_products_is_the_transform():
    _segment, module = segment_of(Hears())
    made = as_products(module)
    found = {node.target for node in made.graph.nodes}
    assert not found & {aten.fft_rfft.default, aten.view_as_real.default}
    with torch.inference_mode():
        (want,), (got,) = module(sounds(5)), made(sounds(5))
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    assert aten.fft_rfft.default in {node.target for node in module.graph.nodes}  # the module itself stays as it was


@pytest.mark.parametrize("length", [8, 9, 400])
@pytest.mark.parametrize("part", [(None, None), (1, 4), (0, None), (2, -1)])
def test_every_range_of_frequencies(length, part):
    class Transform(nn.Module):
        def forward(self, x):
            kept = torch.fft.rfft(x)
            kept = kept if part == (None, None) else kept[..., slice(*part)]
            return torch.view_as_real(kept).flatten(1)

    _segment, module = segment_of(Transform(), x=torch.zeros(3, length))
    made = as_products(module)
    assert aten.fft_rfft.default not in {node.target for node in made.graph.nodes}
    x = torch.randn(4, 3, length, generator=torch.Generator().manual_seed(0))
    (want,), (got,) = module(x), made(x)
    assert got.shape == want.shape
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_without_a_transform_nothing_is_copied():
    _segment, module = segment_of(nn.Linear(32, 16), input=torch.zeros(32))
    assert as_products(module) is module


@pytest.mark.parametrize("how", ["scaled", "all of it", "longer"])
def test_other_transforms_are_not_taken_for_it(how):
    """Other lengths, other norms: left as they are, to be refused by what has none."""

    class Other(nn.Module):
        def forward(self, x):
            made = {"scaled": {"norm": "ortho"}, "all of it": {"dim": 1}, "longer": {"n": 16}}[how]
            return torch.view_as_real(torch.fft.rfft(x, **made)).flatten(1)

    _segment, module = segment_of(Other(), x=torch.zeros(3, 8))
    made, x = as_products(module), torch.randn(4, 3, 8)
    assert torch.allclose(made(x)[0], module(x)[0], atol=1e-5)


def test_mel_power_itself_as_products():
    class Power(nn.Module):
        def __init__(self):
            super().__init__()
            self.power = MelPower(MEL)

        def forward(self, sound):
            return self.power(sound).flatten(1)

    _segment, module = segment_of(Power())
    (want,), (got,) = module(sounds(3)), as_products(module)(sounds(3))
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
