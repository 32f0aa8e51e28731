"""What is kept of a compilation: only what its owner can have written, and only as it was written."""

from __future__ import annotations

import os
import stat

import pytest

from mmpipe.graphs.artefacts import kept


class Maker:
    def __init__(self, content=b"made"):
        self.content, self.count = content, 0

    def __call__(self):
        self.count += 1
        return self.content


def test_it_is_made_once(tmp_path):
    make, folder = Maker(), tmp_path / "new" / "folder"
    assert [kept(folder, "a.bin", make) for _ in range(3)] == [b"made"] * 3
    assert make.count == 1
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "a.bin").stat().st_mode) == 0o600
    assert [path.name for path in folder.iterdir()] == ["a.bin"]


def test_without_a_folder_nothing_is_kept():
    make = Maker()
    assert [kept(None, "a.bin", make) for _ in range(2)] == [b"made"] * 2
    assert make.count == 2


@pytest.mark.parametrize("broken", [b"", b"short", None])
def test_other_bytes_than_were_written_are_made_anew(tmp_path, broken):
    make, path = Maker(), tmp_path / "a.bin"
    kept(tmp_path, "a.bin", make)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"!" if broken is None else broken)
    assert kept(tmp_path, "a.bin", make) == b"made"
    assert make.count == 2
    assert path.read_bytes() == whole


def test_a_file_that_others_may_write_or_a_link_is_not_read(tmp_path):
    make, path = Maker(), tmp_path / "a.bin"
    kept(tmp_path, "a.bin", make)
    path.chmod(0o622)
    kept(tmp_path, "a.bin", make)
    assert make.count == 2
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    kept(tmp_path, "a.bin", make)
    assert make.count == 3
    assert not path.is_symlink()


@pytest.mark.parametrize("mode", [0o750, 0o705, 0o777])
def test_a_folder_that_is_open_to_others_is_not_used(tmp_path, mode):
    kept(tmp_path, "a.bin", Maker(b"before"))
    tmp_path.chmod(mode)
    with pytest.warns(RuntimeWarning, match=rf"is open to others \(mode {mode:o}; chmod 700 would help\): what is"):
        assert kept(tmp_path, "a.bin", Maker(b"after")) == b"after"
    tmp_path.chmod(0o700)
    assert kept(tmp_path, "a.bin", Maker(b"after")) == b"before"


def test_another_users_folder_is_not_used(tmp_path, monkeypatch):
    kept(tmp_path, "a.bin", Maker(b"before"))
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.warns(RuntimeWarning, match=f"belongs to user {owner}: what is made is not kept"):
        assert kept(tmp_path, "a.bin", Maker(b"after")) == b"after"


def test_a_file_in_the_folders_place_and_a_full_disk_are_said(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    with pytest.warns(RuntimeWarning, match=r"file can't be used \(File exists\)"):
        assert kept(tmp_path / "file", "a.bin", Maker()) == b"made"

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(RuntimeWarning, match=r"a.bin is not kept, .*: No space left on device"):
        assert kept(tmp_path, "a.bin", Maker()) == b"made"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_was_not_used_for_longest_makes_room(tmp_path):
    for age, name in enumerate("dcba"):
        kept(tmp_path, name, Maker(bytes(1000)))
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    kept(tmp_path, "a", Maker())  # used: it is the newest now
    (tmp_path / "folder").mkdir()
    kept(tmp_path, "e", Maker(bytes(1000)), limit_bytes=3500)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "d", "e", "folder"]
    kept(tmp_path, "f", Maker(bytes(9000)), limit_bytes=3500)  # too large for the limit, and needed now
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f", "folder"]
