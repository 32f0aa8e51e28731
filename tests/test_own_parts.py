"""Encoders and heads of one's own are those beside the configuration, whatever was loaded under their names before."""

from __future__ import annotations

import importlib
import pickle
import sys
from importlib.machinery import PathFinder

import pytest
from support import words

from mmpipe import Pipeline


def head_of(pipeline):
    return type(pipeline.built.head)


def test_two_configurations_have_parts_of_their_own(tmp_path):
    found = {}
    for name in ("one", "two", "one"):
        folder = tmp_path / name
        if not folder.exists():
            words.config(folder)
            parts = folder / "word_parts.py"
            parts.write_text(parts.read_text() + f"\nHead.where = Words.where = helping_parts.WHERE = {name!r}\n")
            parts.write_text("import helping_parts\n" + parts.read_text())
            (folder / "helping_parts.py").write_text("")
        with Pipeline.load(folder / "words.yaml") as pipeline:
            preparation = pipeline.built.preparations["text"]
            found[name] = head_of(pipeline).where, preparation.prepare.__self__.where
            assert head_of(pipeline).__module__ == type(preparation.prepare.__self__).__module__ == "word_parts"
            pickle.dumps(preparation)  # its class is the one that its name means
        assert found[name] == (name, name)


class Editable(PathFinder):
    """As an editable install has one: a folder that is not on the path."""

    folder = ""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return PathFinder.find_spec(name, [cls.folder]) if name == "installed_parts" else None


@pytest.mark.parametrize("helper", ["helping_parts", "json", "installed_parts"])
def test_what_they_import_from_beside_them_is_beside_them(tmp_path, helper, monkeypatch):
    """But for what Python itself knows by that name, which is in use."""
    installed = tmp_path / "installed"
    installed.mkdir()
    (installed / "installed_parts.py").write_text("")
    monkeypatch.setattr(Editable, "folder", str(installed))
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Editable])
    if helper != "helping_parts":
        importlib.import_module(helper)
    for name in ("one", "two"):
        words.config(tmp_path / name)
        parts = tmp_path / name / "word_parts.py"
        parts.write_text(f"import {helper}\n" + parts.read_text() + f"\nHead.where = getattr({helper}, 'WHERE', '')\n")
        (tmp_path / name / f"{helper}.py").write_text(f"WHERE = {name!r}")
        with Pipeline.load(tmp_path / name / "words.yaml") as pipeline:
            assert head_of(pipeline).where == (name if helper == "helping_parts" else "")
