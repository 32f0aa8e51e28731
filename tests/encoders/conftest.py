"""Random-weight models in the hub's own formats, saved once a session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import hub


@pytest.fixture(scope="session")
def kit() -> SimpleNamespace:
    """The helpers of `support.hub`, for the tests in this folder."""
    names = ("texts", "pictures", "sounds", "agree", "batch", "run", "exports", "scramble", "BATCHES")
    return SimpleNamespace(**{name: getattr(hub, name) for name in names})


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    return hub.minilm()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> hub.Models:
    """The folder of a small random model: models("bert"), models("clap"), …"""
    return hub.Models(tmp_path_factory.mktemp("models"))
