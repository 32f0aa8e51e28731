"""Code of our own, compiled for the tests of a file."""

from __future__ import annotations

import pytest

from mmpipe.graphs.backends import kernels


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What is compiled is compiled once."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def loaded(folder):
    kernels.load(folder)
