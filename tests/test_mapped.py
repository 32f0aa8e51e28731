"""Weights that have been packed into another form: their pages go back to the file, and nothing else does."""

import mmap
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import hub

from mmpipe import Pipeline
from mmpipe.mapped import give_back

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells which pages are whose")


def resident(path):
    """Bytes of the file's mappings that this process has in memory."""
    told = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(encoding="utf-8"), flags=re.M)
    ours = [part for part in told if str(path) in part.partition("\n")[0]]
    return sum(1024 * int(kilobytes) for part in ours for kilobytes in re.findall(r"^Rss: +(\d+) kB", part, re.M))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({f"layer{number}": torch.full((1 << 20,), float(number)) for number in range(8)}, path)
    return path


def test_pages_that_nobody_wrote_to_are_given_back(file):
    weights = load_file(file)
    before = {name: tensor.clone() for name, tensor in weights.items()}
    whole = resident(file)
    assert whole > 30_000_000
    assert give_back(weights.values()) > 30_000_000
    assert resident(file) < whole / 20
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights.items())


def test_what_was_written_stays(file):
    weights = load_file(file)
    weights["layer3"] += 1  # all of it, and one number in the midst of another
    weights["layer5"][1000] = -7
    before = {name: tensor.clone() for name, tensor in weights.items()}
    assert 20_000_000 < give_back(weights.values()) < 30_000_000
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights.items())


def test_memory_that_is_no_file_stays():
    plain, shared = torch.arange(1 << 20), torch.arange(1 << 20).share_memory_()
    anonymous = torch.frombuffer(mmap.mmap(-1, 4 << 20), dtype=torch.uint8)
    anonymous[:] = 3
    give_back([plain, shared, anonymous, torch.empty(1 << 20, device="meta"), torch.eye(1 << 10).to_sparse()])
    assert torch.equal(plain, torch.arange(1 << 20))
    assert torch.equal(shared, plain)
    assert bool((anonymous == 3).all())


def test_what_has_no_memory_of_its_own_is_passed_over():
    class Stands(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, *rest):
            raise NotImplementedError

    stands = torch.Tensor._make_wrapper_subclass(Stands, (1 << 20,))
    assert give_back([stands, torch.nn.LazyLinear(5).weight, torch.empty(0)]) == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_pipeline_keeps_the_form_that_it_computes_with(dtype):
    """Fingerprints, which read every weight, too."""
    path = Path(hub.minilm()) / "model.safetensors"
    made = {
        "task": "embed",
        "encoders": {"text": {"model": f"hf:{hub.minilm()}", "max_tokens": 16}},
        "runtime": {"dtype": dtype, "cache": "off"},
    }
    with Pipeline.load(made) as pipeline:
        (one,) = pipeline.embed([{"text": "a red shoe"}])
        pipeline.fingerprints([])
        taken = resident(path.resolve())
        (again,) = pipeline.embed([{"text": "a red shoe"}])
    assert (one == again).all()
    file_bytes = path.stat().st_size
    assert taken > 0.9 * file_bytes if dtype == "float32" else taken < 0.3 * file_bytes
