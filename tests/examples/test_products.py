"""The demo's data are what its description says, and the shipped media are what make.py makes."""

from __future__ import annotations

import csv
import gzip
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import soundfile
from PIL import Image

FOLDER = Path(__file__).parents[2] / "examples" / "products"
SHIPPED = Path(__file__).parents[2] / "configs" / "quickstart"
MODULES = ("photos", "titles", "voices", "make")
N = 6_000  # items in the statistics


@pytest.fixture(scope="module")
def modules() -> Iterator[dict[str, ModuleType]]:
    """The example's own modules, as a script beside them would import them."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield {name: __import__(name) for name in MODULES}
    finally:
        sys.path.remove(str(FOLDER))
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def classes(modules: dict[str, ModuleType]) -> dict[str, object]:
    """Split -> classes of its idx file. Random where Fashion-MNIST isn't installed: the drawing is the same."""
    draw = np.random.default_rng(0)
    found: dict[str, object] = {}
    for split in modules["make"].SPLITS:
        part, size = modules["make"].photo_range(split)[0], 60_000
        try:
            found[split] = modules["photos"].load_photos(part)[1]
        except modules["photos"].PhotosMissing:
            found[split] = draw.integers(0, 10, size if part == "train" else 10_000).astype(np.uint8)
    return found


@pytest.fixture(scope="module")
def items(modules: dict[str, ModuleType], classes: dict[str, object]) -> dict[str, list[object]]:
    return {split: list(islice(modules["make"].plan(split, 5, classes[split]), N)) for split in modules["make"].SPLITS}


@pytest.fixture(scope="module")
def fake_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Fashion-MNIST of grey squares, in the published format."""
    folder = tmp_path_factory.mktemp("photos")
    draw = np.random.default_rng(0)
    for part, n in (("train", 60_000), ("t10k", 10_000)):
        pictures = np.zeros((n, 28, 28), np.uint8)
        pictures[:, 4:24, 4:24] = draw.integers(0, 256, (n, 1, 1), np.uint8)
        classes = (np.arange(n) % 10).astype(np.uint8)
        for kind, array in (("images-idx3", pictures), ("labels-idx1", classes)):
            header = bytes((0, 0, 8, array.ndim)) + b"".join(size.to_bytes(4, "big") for size in array.shape)
            (folder / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes(), 1))
    return folder


def script(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, FOLDER / name, *arguments]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_same_arguments_give_the_same_bytes_whatever_the_jobs(tmp_path: Path, fake_photos: Path) -> None:
    pytest.importorskip("espeakng_loader")
    for out, n, seed, jobs in (("a", 24, 3, 1), ("b", 24, 3, 2), ("more", 26, 3, 2), ("other", 24, 4, 2)):
        done = script("make.py", tmp_path / out, "--n", str(n), "--split", "test", "--seed", str(seed),
                      "--jobs", str(jobs), "--photos", fake_photos)  # fmt: skip
        assert done.returncode == 0, done.stderr
    a = content(tmp_path / "a")
    assert a == content(tmp_path / "b")
    assert (tmp_path / "a.labels.csv").read_bytes() == (tmp_path / "b.labels.csv").read_bytes()
    assert {name: content(tmp_path / "more").get(name) for name in a} == a  # the first items of a larger folder
    assert a != content(tmp_path / "other")

    rows = list(csv.DictReader((tmp_path / "a.labels.csv").read_text(encoding="utf-8").splitlines()))
    assert [row["id"] for row in rows] == [f"item-{i:05d}" for i in range(24)]
    assert {Path(name).stem for name in a} == {row["id"] for row in rows}
    for name in a:
        path = tmp_path / "a" / name
        if path.suffix == ".flac":
            sound = soundfile.info(path)
            assert (sound.samplerate, sound.channels, sound.subtype) == (16_000, 1, "PCM_16")
            assert 1.5 <= sound.duration <= 3.5
        elif path.suffix in (".jpg", ".png"):
            with Image.open(path) as image:
                assert image.size == (112, 112)
            assert path.stat().st_size < 12_000
        else:
            assert path.suffix == ".txt"
            assert path.read_text(encoding="utf-8").strip()


def test_broken_items_are_broken_as_said(tmp_path: Path, fake_photos: Path) -> None:
    pytest.importorskip("espeakng_loader")
    done = script("make.py", tmp_path / "out", "--n", "2", "--split", "test", "--jobs", "1", "--photos", fake_photos,
                  "--broken")  # fmt: skip
    assert done.returncode == 0, done.stderr
    broken = {path.name: path for path in (tmp_path / "out").iterdir() if path.name.startswith("broken")}
    assert set(broken) == {"broken-01.jpg", "broken-02.flac", "broken-02.txt"}
    assert {path.stem for path in (tmp_path / "out").iterdir()} <= {
        "item-00000",
        "item-00001",
        "broken-01",
        "broken-02",
    }
    with pytest.raises(OSError, match="truncated"), Image.open(broken["broken-01.jpg"]) as image:
        image.load()
    with pytest.raises(soundfile.LibsndfileError):
        soundfile.read(broken["broken-02.flac"])
    rows = (tmp_path / "out.labels.csv").read_text(encoding="utf-8").splitlines()
    assert [row.split(",")[0] for row in rows] == ["id", "item-00000", "item-00001", "broken-01", "broken-02"]


def test_no_photos_is_an_error_that_says_what_to_install(tmp_path: Path) -> None:
    done = script("make.py", tmp_path / "out", "--n", "3", "--split", "test", "--photos", tmp_path)
    assert done.returncode == 2
    assert "dataset-fashion-mnist" in done.stderr
    assert "--photos DIR" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_with_something_in_it_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    done = script("make.py", tmp_path, "--n", "3", "--split", "test")
    assert done.returncode == 2
    assert "not an empty folder" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_media_are_missing_and_wrong_as_often_as_said(
    items: dict[str, list[object]], classes: dict[str, object], modules: dict[str, ModuleType]
) -> None:
    labels = modules["photos"].LABELS
    for split, found in items.items():
        present = {key: [i for i in found if getattr(i, key) is not None] for key in ("photo", "title", "note")}
        for key, missing in (("photo", 0.05), ("title", 0.10), ("note", 0.15)):
            assert abs(1 - len(present[key]) / N - missing) < 0.015, key
        wrong = sum(labels[classes[split][i.photo]] != i.label for i in present["photo"])  # type: ignore[attr-defined, index]
        assert abs(wrong / N - 0.03) < 0.01
        decibels = [i.note.snr_db for i in present["note"]]  # type: ignore[attr-defined]
        assert 0 <= min(decibels) < 0.5
        assert 19.5 < max(decibels) <= 20
        assert all(i.photo is not None or i.title is not None or i.note is not None for i in found)  # type: ignore[attr-defined]


def test_no_photo_is_shared_or_used_twice(items: dict[str, list[object]], modules: dict[str, ModuleType]) -> None:
    used = {split: [i.photo for i in found if i.photo is not None] for split, found in items.items()}  # type: ignore[attr-defined]
    for split, photos in used.items():
        assert len(set(photos)) == len(photos)
        assert set(photos) <= set(modules["make"].photo_range(split)[1])
    assert not set(used["train"]) & set(used["tune"])
    assert modules["make"].photo_range("test")[0] == "t10k"


def test_no_voice_and_no_template_is_shared(items: dict[str, list[object]], modules: dict[str, ModuleType]) -> None:
    titles, voices = modules["titles"], modules["voices"]
    variants = {split: {i.note.variant for i in found if i.note} for split, found in items.items()}  # type: ignore[attr-defined]
    for one, other in (("train", "tune"), ("train", "test"), ("tune", "test")):
        assert not variants[one] & variants[other]
        assert not set(voices.VARIANTS[one]) & set(voices.VARIANTS[other])
        for templates in (titles.INFORMATIVE, titles.VAGUE, titles.SENTENCES):
            assert not set(templates[one]) & set(templates[other])
    for split in titles.INFORMATIVE:  # nor are they the same words around other punctuation
        for other in set(titles.INFORMATIVE) - {split}:
            assert not {re.sub(r"[^a-z0-9{}]", "", t) for t in titles.SENTENCES[split]} & {
                re.sub(r"[^a-z0-9{}]", "", t) for t in titles.SENTENCES[other]
            }


def test_at_most_half_of_all_titles_hold_a_labels_word(
    items: dict[str, list[object]], modules: dict[str, ModuleType]
) -> None:
    words = {word for label in modules["photos"].LABELS for word in re.findall(r"[a-z]{3,}", label.lower())}
    anywhere = re.compile(rf"\b({'|'.join(words)}|t-?shirt)(s|es)?\b", re.IGNORECASE)
    for found in items.values():
        given = [i.title for i in found if i.title is not None]  # type: ignore[attr-defined]
        share = sum(bool(anywhere.search(title)) for title in given) / len(given)
        assert 0.15 < share < 0.5
        assert len(set(given)) > 0.8 * len(given)
    for label in modules["photos"].LABELS:  # what is meant to hold none does hold none
        words_of = modules["titles"].CATEGORIES[label]
        assert not [thing for thing in (*words_of.other, *words_of.details) if anywhere.search(thing)]


def test_a_vague_title_tells_nothing_of_the_category(modules: dict[str, ModuleType]) -> None:
    titles = modules["titles"]
    telling = {
        word
        for words in titles.CATEGORIES.values()
        for thing in (*words.named, *words.other, *words.details, *words.materials)
        for word in re.findall(r"[a-z]{4,}", thing.lower())
    }
    neutral = {"with", "white", "black", "back", "from", "worn", "barely", "post"}  # "collection or post", "toe post"
    draw = random.Random(0)
    for split in titles.VAGUE:
        for _ in range(500):
            found = set(re.findall(r"[a-z]{4,}", titles.vague(split, draw).lower()))
            assert not (found & telling) - neutral


def test_a_note_is_spoken_at_the_asked_loudness_over_the_noise(modules: dict[str, ModuleType]) -> None:
    pytest.importorskip("espeakng_loader")
    voices = modules["voices"]
    quiet, loud = (
        voices.render(voices.Note("A nice coat.", "en", "m3", 160, 50, snr, (0.2, 0.3, 0.5), 7), "train").astype(float)
        for snr in (60.0, 0.0)
    )
    assert len(quiet) == len(loud) == voices.MIN_SAMPLES
    speech = quiet / np.sqrt(np.mean(quiet[np.abs(quiet) > 0.01 * np.abs(quiet).max()] ** 2))
    gain = float(speech @ loud / (speech @ speech))
    rest = loud - gain * speech
    assert 0.5 < np.mean(rest**2) / gain**2 < 2  # 0 dB


def test_training_runs_from_end_to_end(tmp_path: Path, fake_photos: Path) -> None:
    pytest.importorskip("espeakng_loader")
    done = script("train.py", tmp_path / "out", "--quick", "--photos", fake_photos)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "photo.safetensors", "title.safetensors", "note.safetensors", "head.safetensors", "metrics.json",
    }  # fmt: skip


def test_the_shipped_items_are_what_make_makes(tmp_path: Path, modules: dict[str, ModuleType]) -> None:
    """Not chosen by hand. Sound and pictures may differ in bytes under other library versions, so: titles and names."""
    try:
        modules["photos"].load_photos("t10k")
    except modules["photos"].PhotosMissing:
        pytest.skip("Fashion-MNIST is not installed")
    planned = list(islice(modules["make"].plan("test", 0, modules["photos"].load_photos("t10k")[1]), 60))
    shipped = {path.name: path for path in (SHIPPED / "media").iterdir() if not path.name.startswith("broken-")}
    expected = set()
    for item in planned:
        expected |= {f"{item.id}{item.photo_suffix}"} if item.photo is not None else set()
        expected |= {f"{item.id}.flac"} if item.note is not None else set()
        if item.title is not None:
            expected.add(f"{item.id}.txt")
            assert shipped[f"{item.id}.txt"].read_text(encoding="utf-8") == item.title + "\n"
    assert set(shipped) == expected
    rows = list(csv.DictReader((SHIPPED / "labels.csv").read_text(encoding="utf-8").splitlines()))
    assert [(row["id"], row["label"]) for row in rows[:60]] == [(item.id, item.label) for item in planned]


def test_what_ships_is_small() -> None:
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()) < 15_000_000
