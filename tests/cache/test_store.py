"""Memory and disk: what was put is there, within the limit, or is not there at all; no errors, and no other bytes."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time

import pytest

from mmpipe.cache import Disk, Layers, Memory, folder, opened
from mmpipe.cache.disk import BATCH, FILE

GENEROUS = 1_000_000_000


def entries(start, count, size=200):
    return {b"%032d" % number: bytes([number % 251]) * size for number in range(start, start + count)}


def test_memory_keeps_what_was_used_last():
    memory = Memory(limit_bytes=10 * (32 + 100 + 200))
    first = entries(0, 10, size=100)
    memory.put_many(first)
    assert memory.get_many([*first][:1]) == entries(0, 1, size=100)  # now the one used last
    memory.put_many(entries(10, 9, size=100))
    assert [*memory.get_many([*first])] == [*first][:1]


def test_layers_give_what_any_has_and_bring_it_nearer():
    near, far = Memory(GENEROUS), Memory(GENEROUS)
    layers = Layers(near, far)
    far.put_many(entries(0, 3))
    near.put_many(entries(3, 2))
    assert layers.get_many([*entries(0, 7)]) == entries(0, 5)
    assert near.get_many([*entries(0, 3)]) == entries(0, 3)


def test_the_disk_outlives_the_process(tmp_path):
    first = Disk(tmp_path / "new" / "folder", GENEROUS)
    first.put_many(entries(0, 2 * BATCH + 5))
    assert first.get_many([*entries(2 * BATCH, 5)]) == entries(2 * BATCH, 5)  # not written yet, and there
    first.close()
    again = Disk(tmp_path / "new" / "folder", GENEROUS)
    assert again.get_many([*entries(0, 2 * BATCH + 9)]) == entries(0, 2 * BATCH + 5)
    assert (again.notes(), (tmp_path / "new" / "folder").stat().st_mode & 0o077) == ([], 0)  # nobody else's
    again.close()


def test_the_limit_holds_and_the_oldest_go_first(tmp_path, monkeypatch):
    limit = 600_000
    disk = Disk(tmp_path, limit)
    for number in range(20):
        monkeypatch.setattr("mmpipe.cache.disk._now", lambda at=number: at)
        disk.put_many(entries(number * BATCH, BATCH))
        disk.flush()
        disk.get_many([*entries(0, 10)])  # the first ten are used all the time
    disk.close()
    assert (tmp_path / FILE).stat().st_size <= limit
    again = Disk(tmp_path, limit)
    assert again.get_many([*entries(19 * BATCH, BATCH)]) == entries(19 * BATCH, BATCH)
    assert again.get_many([*entries(0, 10)]) == entries(0, 10)
    assert again.get_many([*entries(10, BATCH - 10)]) == {}
    again.close()


def test_two_at_once_on_one_folder(tmp_path):
    stores = [Disk(tmp_path, GENEROUS) for _ in range(2)]

    def work(number):
        for start in range(0, 2000, 100):
            stores[number].put_many(entries(start, 100))
            stores[number].flush()
            found = stores[number].get_many([*entries(0, start)])
            assert found == entries(0, start)

    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1, 0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for store in stores:
        assert store.get_many([*entries(0, 2000)]) == entries(0, 2000)
        assert store.notes() == []
        store.close()


WRITER = """
import sys; from pathlib import Path; from mmpipe.cache import Disk
disk = Disk(Path(sys.argv[1]), 10**9)
for number in range(10**6):
    disk.put_many({b"%032d" % number: bytes([number % 251]) * 200})
    if number == 3000: print("going", flush=True)
"""


def test_processes_that_are_killed_while_they_write_leave_whole_entries(tmp_path):
    for _ in range(2):
        writers = [
            subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE) for _ in range(2)
        ]
        for writer in writers:
            assert writer.stdout.readline() == b"going\n"
        time.sleep(0.05)
        for writer in writers:
            os.kill(writer.pid, signal.SIGKILL)
            writer.communicate()
        disk = Disk(tmp_path, GENEROUS)
        found = disk.get_many([*entries(0, 3000)])
        assert found == entries(0, len(found))
        assert len(found) > 2000
        disk.put_many(entries(5, 1))
        disk.close()
        assert disk.notes() == []


def test_a_value_that_is_not_what_was_put_is_not_there(tmp_path):
    disk = Disk(tmp_path, GENEROUS)
    disk.put_many(entries(0, 3))
    disk.close()
    with sqlite3.connect(tmp_path / FILE) as database:
        key, other = [*entries(0, 2)]
        database.execute("UPDATE entries SET value = ? WHERE key = ?", (b"\x01" * 200, key))
        database.execute("UPDATE entries SET value = 'text' WHERE key = ?", (other,))
    database.close()
    again = Disk(tmp_path, GENEROUS)
    assert again.get_many([*entries(0, 3)]) == entries(2, 1)
    again.close()


@pytest.mark.parametrize("how", ["truncated", "flipped", "other", "empty"])
def test_a_broken_file_is_begun_anew(tmp_path, how):
    disk = Disk(tmp_path, GENEROUS)
    disk.put_many(entries(0, 3000))
    disk.close()
    path = tmp_path / FILE
    data = bytearray(path.read_bytes())
    if how == "flipped":
        for place in range(150, len(data), 1111):
            data[place] ^= 0xFF
    path.write_bytes({"truncated": data[: len(data) // 3], "other": b"no database" * 999, "empty": b""}.get(how, data))
    again = Disk(tmp_path, GENEROUS)
    found = again.get_many([*entries(0, 3000)])
    assert found.items() <= entries(0, 3000).items()
    for _ in range(3):  # to see that it is broken, to begin anew, to keep
        again.put_many(entries(5000, 500))
        again.flush()
        again.get_many([*entries(0, 3000)])
    assert again.get_many([*entries(5000, 500)]) == entries(5000, 500)
    assert again.notes() == []
    again.close()


def test_a_folder_that_cant_be_written_is_a_note(tmp_path):
    (tmp_path / "file").write_text("")
    disk = Disk(tmp_path / "file" / "cache", GENEROUS)
    for _ in range(3):
        disk.put_many(entries(0, 300))
        assert disk.get_many([*entries(0, 3)]) == {}
    disk.close()
    (note,) = disk.notes()
    assert "memory only" in note
    assert str(tmp_path / "file") in note


def test_a_full_disk_keeps_what_it_has(tmp_path):
    disk = Disk(tmp_path, GENEROUS)
    disk.put_many(entries(0, 300))
    disk.flush()
    disk._connected().execute("PRAGMA max_page_count = 1")  # as small as it is now: SQLITE_FULL, as of a full disk
    for start in range(1000, 30_000, 1000):
        disk.put_many(entries(start, 1000))
    assert disk.get_many([*entries(0, 300)]) == entries(0, 300)
    (note,) = disk.notes()
    assert "full" in note
    disk.close()


def test_where_it_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for name, want in ((None, tmp_path / ".cache" / "mmpipe"), ("~/c", tmp_path / "c"), ("off", None)):
        monkeypatch.delenv("MMPIPE_CACHE")
        if name is not None:
            monkeypatch.setenv("MMPIPE_CACHE", name)
        assert folder() == want
        if name is None:
            monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
            assert folder() == tmp_path / "x" / "mmpipe"
            monkeypatch.setenv("MMPIPE_CACHE", "")
    assert len(opened(GENEROUS).layers) == 1  # off: memory alone
