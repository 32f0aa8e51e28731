"""Processes that decode: the same rows as threads, and nothing lost when one of them ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from support import hub, shop

from mmpipe import Pipeline
from mmpipe.build import Preparation
from mmpipe.decoders import Decoders, available
from mmpipe.encoders import load as load_encoder
from mmpipe.engine import Wish
from mmpipe.errors import MediaError
from mmpipe.media import Limits, View

pytestmark = pytest.mark.skipif(not available(), reason="no memory that processes share without a name here")

ODD = """
import os, signal, time
import torch

def prepare(text):
    if text.startswith("crash"):
        os.kill(os.getpid(), signal.SIGSEGV)
    if text.startswith("once") and not os.path.exists(text.split()[1]):
        open(text.split()[1], "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    if text.startswith("slow"):
        time.sleep(2)
    if text.startswith("raise"):
        raise ValueError("this text is odd")
    return {"ids": torch.full((len(text), 3), os.getpid()), "flag": torch.tensor([True])}
"""


def until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.fixture
def odd(tmp_path, monkeypatch):
    """Decoders of two processes with a prepare() of one's own; ask(text) → what came, once a process is there."""
    (tmp_path / "odd_prepare.py").write_text(ODD)
    monkeypatch.syspath_prepend(str(tmp_path))
    import odd_prepare

    decoders = Decoders({"text": Preparation("text", 1, odd_prepare.prepare, None, {}, ())}, Limits(), 2)

    def ask(text, source=None):
        path = tmp_path / "it.txt"
        path.write_text(text)
        found = []

        def put(tensors):
            found.append({name: tensor.clone() for name, tensor in tensors.items()})

        until(lambda: decoders.decode("text", source or path, put, spent.append))
        return found[0]

    spent = []
    ask.decoders, ask.spent = decoders, spent
    yield ask
    decoders.close()
    sys.modules.pop("odd_prepare", None)


def test_a_medium_comes_back_as_it_was_prepared_there_however_large(odd):
    small, large = odd("one"), odd("n" * 200_000)
    assert small["ids"].shape == (3, 3)
    assert int(small["ids"][0, 0]) != os.getpid()
    assert large["ids"].shape == (200_000, 3)
    assert large["ids"].dtype == torch.int64
    assert (large["ids"] == large["ids"][0, 0]).all()
    assert large["flag"].tolist() == [True]


def test_what_is_wrong_with_a_medium_is_said_as_threads_say_it(odd, tmp_path):
    with pytest.raises(MediaError) as caught:
        odd("raise it")
    assert (caught.value.code, caught.value.text) == ("unusable", "ValueError: this text is odd")
    with pytest.raises(MediaError) as caught:
        odd("", tmp_path / "nowhere.txt")
    assert (caught.value.code, caught.value.text) == ("not_found", "nowhere.txt: no such file")
    assert odd("after")["ids"].shape == (5, 3)
    assert len(odd.spent) == 3  # what fails takes its time too


def test_a_file_that_crashes_its_decoder_costs_its_own_row(odd):
    odd("both")
    until(lambda: odd("there") is not None and len(odd.decoders._free) == 2)
    with pytest.raises(MediaError) as caught:
        odd("crash")
    assert (caught.value.code, caught.value.text) == ("corrupt", "it.txt: the decoder crashed (signal 11) on it")
    assert odd("after")["ids"].shape == (5, 3)  # others were started in their place


def test_a_process_that_somebody_kills_costs_nothing(odd, tmp_path):
    odd("both")
    until(lambda: odd("there") is not None and len(odd.decoders._free) == 2)
    assert odd(f"once {tmp_path / 'seen'}")["flag"].tolist() == [True]


def test_the_second_try_waits_for_a_process_that_is_free(odd, tmp_path):
    odd("both")
    until(lambda: odd("there") is not None and len(odd.decoders._free) == 2)
    (tmp_path / "slow.txt").write_text("slow")
    busy = threading.Thread(target=odd.decoders.decode, args=("text", tmp_path / "slow.txt", lambda tensors: None))
    busy.start()
    until(lambda: len(odd.decoders._free) == 1)
    (idle,) = odd.decoders._free
    idle._process.kill()
    idle._process.wait()
    assert odd("good")["ids"].shape == (4, 3)
    busy.join()


def test_any_kind_of_path_is_sent_wherever_the_program_has_gone_since(odd, tmp_path, monkeypatch):
    odd("begin")
    (tmp_path / "there").mkdir()
    (tmp_path / "there/a.txt").write_text("abc")
    monkeypatch.chdir(tmp_path / "there")
    assert odd("", Path("a.txt"))["ids"].shape == (3, 3)
    (entry,) = os.scandir(".")
    assert odd("", entry)["ids"].shape == (3, 3)


def test_a_name_that_is_no_text_is_told_of_in_text(odd, tmp_path):
    odd("begin")
    name = os.fsdecode(b"a\xff.txt")
    (tmp_path / name).write_text("crash")
    with pytest.raises(MediaError) as caught:
        odd("", tmp_path / name)
    assert caught.value.text.encode() == b"a\\xff.txt: the decoder crashed (signal 11) on it"


def test_a_branch_that_is_not_found_there_is_decoded_here_and_the_others_there(tmp_path, monkeypatch):
    (tmp_path / "lost_prepare.py").write_text("def prepare(medium):\n    return {}\n")
    (tmp_path / "odd_prepare.py").write_text(ODD)
    monkeypatch.syspath_prepend(str(tmp_path))
    import lost_prepare
    import odd_prepare

    (tmp_path / "lost_prepare.py").unlink()
    ways = {"text": odd_prepare.prepare, "image": lost_prepare.prepare}
    made = Decoders({name: Preparation(name, 1, way, None, {}, ()) for name, way in ways.items()}, Limits(), 1)
    (tmp_path / "it.txt").write_text("it")
    until(lambda: made.decode("text", tmp_path / "it.txt", lambda tensors: None))
    assert not made.decode("image", tmp_path / "it.png", print)
    assert "image: decoded by threads: a process could not: ModuleNotFoundError" in made.note
    made.close()
    for name in ("lost_prepare", "odd_prepare"):
        sys.modules.pop(name)


def test_what_was_found_beside_a_configuration_is_found_there_too(tmp_path):
    (tmp_path / "beside_prepare.py").write_text("import torch\ndef prepare(text):\n    return {'ids': torch.ones(2)}\n")
    sys.path.insert(0, str(tmp_path))
    import beside_prepare

    sys.path.remove(str(tmp_path))  # as it is when an encoder of one's own has been loaded
    made = Decoders({"text": Preparation("text", 1, beside_prepare.prepare, None, {}, ())}, Limits(), 1)
    (tmp_path / "it.txt").write_text("it")
    until(lambda: made.decode("text", tmp_path / "it.txt", lambda tensors: None))
    assert made.note == ""
    made.close()
    sys.modules.pop("beside_prepare")


def test_what_is_in_memory_is_not_sent_and_a_part_of_a_file_is(odd, tmp_path):
    odd("begin")
    assert not odd.decoders.decode("text", "a text, not a path", print)
    assert not odd.decoders.decode("image", tmp_path / "a.png", print)  # nobody prepares it there
    (tmp_path / "it.txt").write_text("whole text")
    assert odd("whole text", View(tmp_path / "it.txt", start=6))["ids"].shape == (4, 3)


def test_a_prepare_that_can_t_be_sent_or_found_is_told_of_and_threads_go_on(tmp_path):
    local = Decoders({"text": Preparation("text", 1, lambda text: {}, None, {}, ())}, Limits(), 1)
    assert "can't be sent to a process" in local.note
    assert local._all == set()
    assert not local.decode("text", tmp_path / "it.txt", print)
    local.close()


def test_closing_ends_the_processes_and_does_not_wait_for_those_that_start():
    decoders = Decoders({"text": Preparation("text", 1, len, None, {}, ())}, Limits(), 2)
    started = [decoder._process for decoder in decoders._all]
    decoders.close()
    assert [process.returncode for process in started] == [-signal.SIGKILL] * 2
    assert not decoders.decode("text", "a", print)


def test_the_processes_of_a_killed_program_end(tmp_path):
    script = tmp_path / "main.py"
    script.write_text(
        "import time\n"
        "from mmpipe.build import Preparation\n"
        "from mmpipe.decoders import Decoders\n"
        "from mmpipe.media import Limits\n"
        "made = Decoders({'text': Preparation('text', 1, len, None, {}, ())}, Limits(), 1)\n"
        "print(*[decoder._process.pid for decoder in made._all], flush=True)\n"
        "time.sleep(600)\n"
    )
    program = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    (child,) = map(int, program.stdout.readline().split())
    os.kill(program.pid, signal.SIGKILL)
    program.communicate()
    until(lambda: not alive(child))


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_job_writes_the_same_bytes_either_way(weights, tmp_path):
    folder = shop.media(tmp_path / "media", 40)
    (folder / "item-004.png").write_bytes(b"")
    (folder / "item-006.wav").write_bytes(b"RIFF")
    (folder / "item-008.png").write_bytes((folder / "item-008.png").read_bytes()[:200])
    written = {}
    for way in ("threads", "processes"):
        config = shop.config(
            weights,
            [{"after": "image", "threshold": 0.55}],
            output={"shard_rows": 16, "probabilities": True, "embeddings": True},
            runtime={"batch_size": 8, "decoding": way, "cache": "off"},
        )
        with Pipeline.load(config) as pipeline:
            assert pipeline.resolved.decoding == way
            if way == "processes":  # from the first medium on
                decoders = pipeline._engine.decoders(Wish())
                until(lambda found=decoders: found._look() or not found._coming)
            pipeline.run_folder(folder, tmp_path / way, mode="overwrite")
            if way == "processes":
                assert decoders.note == ""
                assert any(decoder._memory is not None for decoder in decoders._free)
        written[way] = {part.name: part.read_bytes() for part in (tmp_path / way / "predictions").iterdir()}
        table = pq.read_table(tmp_path / way / "predictions", columns=["id", "error"])
        assert sum(error is not None for error in table.column("error").to_pylist()) >= 2
    assert written["threads"] == written["processes"]


def test_many_threads_share_them_and_whoever_finds_none_free_is_told_to_decode(odd, tmp_path):
    odd("begin")
    wrong, theirs, own = [], [], []

    def work(number):
        path = tmp_path / f"{number}.txt"
        path.write_text("x" * (number + 1))
        for _ in range(50):
            seen = []
            if not odd.decoders.decode("text", path, lambda tensors, seen=seen: seen.append(len(tensors["ids"]))):
                own.append(number)
                continue
            theirs.append(number)
            if seen != [number + 1]:
                wrong.append((number, seen))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(theirs) + len(own) == 6 * 50
    assert theirs
    assert own  # six threads, two processes


@pytest.mark.parametrize("family", hub.FAMILIES)
def test_every_family_of_models_can_be_prepared_for_elsewhere(tmp_path, family):
    encoder = load_encoder(hub.section(hub.Models(tmp_path), family)["model"], hub.FAMILIES[family])
    encoder.release()
    for prepare in (encoder.prepare, encoder.prepare_fast):
        made = Decoders({"it": Preparation(encoder.modality, encoder.dim, prepare, None, {}, ())}, Limits(), 0)
        assert made.note == ""
