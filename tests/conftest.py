"""What every test needs."""

from __future__ import annotations

import os
import signal

import pytest
import torch

# What is computed is what is tested; tests of the cache name a folder of their own.
os.environ["MMPIPE_CACHE"] = "off"

# A shell starts what it runs in the background with Ctrl-C ignored, and so would every process that a test starts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")


@pytest.fixture(autouse=True)
def _full_float32_on_a_gpu(request):
    """What a GPU answers is compared with what a CPU does: no TF32 in convolutions and products."""
    places = (torch.backends.cudnn, torch.backends.cuda.matmul) if request.node.get_closest_marker("gpu") else ()
    before = [place.allow_tf32 for place in places]
    for place in places:
        place.allow_tf32 = False
    yield
    for place, value in zip(places, before, strict=True):
        place.allow_tf32 = value


@pytest.fixture(autouse=True)
def _no_gpu_by_default(monkeypatch):
    """What `auto` computes on is the same on every machine; tests of a GPU name it."""
    from mmpipe import placing

    monkeypatch.setattr(placing, "cuda_devices", lambda: 0)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own, which is not there yet."""
    monkeypatch.setenv("MMPIPE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """Random weights of the small encoders and of a head over them: what `shop.config` wants."""
    from support import shop

    return shop.weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def pipeline(weights):
    """Three small encoders with exits after image, and after image and text."""
    from support import shop

    from mmpipe import Pipeline

    with Pipeline.load(shop.config(weights, shop.EXITS)) as made:
        yield made
