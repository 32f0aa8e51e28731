"""The report tells a run's numbers truly, opens nothing it shouldn't, and can't be broken by what it shows."""

from __future__ import annotations

import os
import random
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support.report_run import LABELS, item, products, run_of, tally_of, write_media

from mmpipe.jobs.markup import CUT, escape, percent, seconds
from mmpipe.jobs.media_cells import PLAYER_BYTES
from mmpipe.jobs.report import headline, write_report
from mmpipe.jobs.report_sections import bounded_by, time_parts
from mmpipe.jobs.tally import Tally
from mmpipe.media import Limits
from mmpipe.types import MODALITIES, Prediction, Sample

_VOID = {"meta", "img", "br", "wbr", "rect"}


class _Page(HTMLParser):
    """Elements with their attributes, and the text; refuses what is not closed as it was opened."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if tag not in _VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def having(self, name: str) -> list[dict[str, str]]:
        """Attributes of the elements with this class."""
        return [attributes for _, attributes in self.elements if name in attributes.get("class", "").split()]

    def sections(self) -> list[str]:
        return [attributes["aria-labelledby"] for tag, attributes in self.elements if tag == "section"]


def _report(folder: Path, tally: Tally, *, thumbnails: bool = True, limits: Limits | None = None, **run: Any) -> _Page:
    path = folder / "report.html"
    write_report(path, tally, run_of(tally, **run), title="products", thumbnails=thumbnails, limits=limits or Limits())
    assert path.stat().st_size < 3_000_000
    assert [other.name for other in folder.iterdir() if other.is_file()] == ["report.html"]
    return _Page(path.read_text(encoding="utf-8"))


def _counts(rows: int, **answered: int) -> Tally:
    tally = Tally(LABELS, ("image", "image+text", "all"), MODALITIES, rows=rows)
    tally.answered_by.update({"image+text" if name == "both" else name: many for name, many in answered.items()})
    return tally


@pytest.mark.parametrize(
    ("tally", "said"),
    [
        (_counts(62, image=38, both=14, all=9), "62 samples: 61 answered, 38 of them from the image alone."),
        (_counts(1, image=1), "1 sample: answered, from the image alone."),
        (_counts(1, all=1), "1 sample: answered, none early."),
        (_counts(2000, both=900, all=1100), "2,000 samples: all answered, 900 of them before the last exit."),
        (_counts(5, all=4), "5 samples: 4 answered, none of them early."),
        (_counts(3), "3 samples, and none could be answered."),
        (_counts(1), "1 sample, which could not be answered."),
        (_counts(0), "No sample was run."),
        (Tally((), ("all",), MODALITIES, rows=2, answered_by=Counter(all=2)), "2 samples: all embedded."),
    ],
)
def test_headline_says_in_words_what_was_counted(tally: Tally, said: str) -> None:
    assert headline(tally) == said


def test_the_whole_of_a_run(tmp_path: Path) -> None:
    tally = tally_of(products(tmp_path / "media"))
    page = _report(tmp_path, tally)
    assert page.sections() == ["exits", "stories", "classes", "confidence", "time", "failures", "unsure", "samples"]
    early = tally.answered_by["image"] + tally.answered_by["image+text"]
    never = 3 * 62 - sum(tally.files_opened.values())
    assert f"62 samples: 61 answered, {tally.answered_by['image']} of them from the image alone." in page.text
    assert f"Of 186 files, {never} were never opened" in page.text
    assert f"{early} of 61" in page.text
    assert len(page.having("ribbon")) == 4  # three exits, and what got no answer
    assert len(page.having("story")) == len(tally.stories) == 3
    assert len(page.having("histogram")) == 3
    for modality in MODALITIES:
        assert f"{tally.files_opened[modality]} of 62 opened" in page.text
    for code in ("audio:corrupt", "image:truncated", "text:empty"):
        assert code in page.text
    assert "sha256" not in page.text
    assert "5f0c5f0c" in page.text
    assert len([tag for tag, _ in page.elements if tag == "img"]) >= 24
    assert all(attributes["alt"] for tag, attributes in page.elements if tag == "img")
    assert all(attributes["aria-label"] for tag, attributes in page.elements if tag == "svg")


def test_an_exit_has_one_colour_everywhere(tmp_path: Path) -> None:
    items = [item(write_media(tmp_path / "media", "a", "bag", random.Random(0)), [("coat", 0.4), ("bag", 0.99)])]
    page = _report(tmp_path, tally_of(items))
    ribbons = {attributes["class"].split()[0] for attributes in page.having("ribbon")}
    assert ribbons == {"x1"}  # only image+text answered
    swatches = {attributes["class"].split()[-1] for attributes in page.having("swatch")}
    assert {"x0", "x1", "x2"} <= swatches


def test_nothing_is_loaded_from_anywhere(tmp_path: Path) -> None:
    page = _report(tmp_path, tally_of(products(tmp_path / "media", rows=12)))
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "object", "a", "form", "base"}
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on") or name in ("href", "srcset", "action")]
        assert attributes.get("src", "data:").startswith("data:")
    policy = next(a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert "script-src" not in policy
    style = (tmp_path / "report.html").read_text(encoding="utf-8").split("<style>")[1].split("</style>")[0]
    assert not re.search(r"url\(|@import|@font-face|expression", style)


class _Watched(os.PathLike[str]):
    """A path that notes when somebody wants to open it."""

    def __init__(self, path: Path) -> None:
        self.path, self.touched = path, 0

    def __fspath__(self) -> str:
        self.touched += 1
        return os.fspath(self.path)


def test_media_that_were_not_opened_stay_unopened(tmp_path: Path) -> None:
    watched = []
    items = []
    for index in range(4):
        sample = write_media(tmp_path / "media", f"s{index}", "bag", random.Random(index))
        media = {name: _Watched(path) for name, path in sample.media.items()}
        watched.append(media)
        items.append(item(Sample(sample.id, media), [("bag", 0.97 + index / 1000)]))
    page = _report(tmp_path, tally_of(items))
    assert all(media["image"].touched for media in watched)
    assert not any(media["text"].touched or media["audio"].touched for media in watched)
    assert len(page.having("unopened")) == 4 * 2 + 2  # the cards, and the story


def test_without_thumbnails_only_ids_are_shown(tmp_path: Path) -> None:
    watched: list[_Watched] = []
    items = []
    for sample, prediction, seen in products(tmp_path / "media", rows=14):
        media = {name: _Watched(path) for name, path in sample.media.items()}
        watched.extend(media.values())
        items.append((Sample(sample.id, media), prediction, seen))
    page = _report(tmp_path, tally_of(items), thumbnails=False)
    assert not any(path.touched for path in watched)
    assert not [a for _, a in page.elements if "src" in a]
    assert "size 4" not in page.text  # the end of every title
    assert not page.having("waveform")
    assert len(page.having("card")) == 24
    assert "4701" in page.text


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</style></title></bdi><h1>x",
    "\u202e\u2066right to left \u05e9\u05dc\u05d5\u05dd",
    "nul\x00 bell\x07 escape\x1b del\x7f \x9b",
    "half \ud83d a character, and \U0001f45f whole",
    "a" * 5000,
    "line\nbreak\ttab",
    "",
    "&amp;&lt;&#60;b>",
]


def _page_saying(folder: Path, words: str) -> _Page:
    """A report in which everything that a user can choose is `words`."""
    labels = (words, "other")
    failed = Prediction(words, "failed", f"image:corrupt: {words}", present=("image",), failed=("image",))
    prediction = Prediction(
        words, "ok", label=words, confidence=0.5, top_k=((words, 0.5), ("other", 0.4)), answered_by="all",
        present=("text", "audio"), used=("text",), skipped=("audio",), keep={words: words},
    )  # fmt: skip
    sample = Sample(words, {"text": words or " "})
    rows = [(sample, prediction, [("other", 0.2), ("other", 0.3), (words, 0.5)]), (sample, failed, [])]
    tally = tally_of(rows, labels=labels)
    return _report(folder, tally, resolved={"x": words}, notes=[words], versions={"x": words}, errors={words: 1})


@pytest.mark.parametrize("words", HOSTILE, ids=range(len(HOSTILE)))
def test_what_users_wrote_is_only_ever_text(tmp_path: Path, words: str) -> None:
    page, plain = _page_saying(tmp_path, words), _page_saying(tmp_path, "word")
    cell = {"figure", "blockquote", "b", "span", "bdi"}  # a text that can't be read has another cell
    tags, expected = (Counter(tag for tag, _ in each.elements if tag not in cell) for each in (page, plain))
    assert tags == expected
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", page.text)
    assert "a" * 600 not in page.text


@given(st.text(st.characters(codec=None), max_size=CUT * 6))
def test_escape_gives_short_text_that_can_be_written(words: str) -> None:
    written = escape(words)
    written.encode("utf-8")
    assert not set("<>\"'") & set(written)
    parser = _Page(f"<p>{written}</p>")
    assert sum(map(len, parser.words)) <= CUT


def test_what_cannot_be_shown_is_said_so(tmp_path: Path) -> None:
    class Odd:
        @property
        def shape(self) -> tuple[int, ...]:
            raise RuntimeError("no")

    gone = tmp_path / "media" / "gone"
    large = write_media(tmp_path / "media", "large", "bag", random.Random(0))
    media: list[dict[str, Any]] = [
        {"image": gone / "x.jpg", "text": gone / "x.txt", "audio": gone / "x.wav"},
        {"image": tmp_path, "text": tmp_path, "audio": tmp_path},
        {"image": Odd(), "text": 7, "audio": (Odd(), 1)},
        {"image": b"", "text": b"\xff\xfe\x00", "audio": b"RIFF"},
        dict(large.media),
    ]
    everything = dict.fromkeys(MODALITIES)
    items = []
    for index, found in enumerate(media):
        _, prediction, seen = item(Sample(f"s{index}", everything), [("bag", 0.4), ("bag", 0.5), ("bag", 0.6)])
        items.append((Sample(f"s{index}", found), prediction, seen))
    _, prediction, seen = item(Sample("none", everything), [("bag", 0.9)] * 3)
    items.append((Sample("none", {}), prediction, seen))  # the media are not even there
    limits = Limits(image_megapixels=0.01, text_kilobytes=0.005, audio_minutes=0.001)
    page = _report(tmp_path, tally_of(items), limits=limits)
    assert len(page.having("card")) == 6
    assert len(page.having("broken")) == 18
    assert page.text.count("can’t be shown: not found") == 3
    assert page.text.count("can’t be shown: too large") == 3


def test_the_page_stays_small_whatever_the_media(tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    (tmp_path / "media").mkdir()
    items = []
    for index in range(30):
        picture, sound = tmp_path / "media" / f"{index}.png", tmp_path / "media" / f"{index}.wav"
        Image.fromarray(noise.integers(0, 255, (300, 500, 3), dtype=np.uint8)).save(picture)
        frames = (PLAYER_BYTES + (2000 if index % 3 == 0 else -2000)) // 2
        soundfile.write(sound, noise.uniform(-1, 1, frames), 16000, subtype="PCM_16")
        sample = Sample(f"{index:02d}", {"image": picture, "text": "word " * 10_000, "audio": sound})
        items.append(item(sample, [("coat", 0.5), ("bag", 0.5), ("bag", 0.5 + index / 100)]))
    page = _report(tmp_path, tally_of(items))
    players = [a for tag, a in page.elements if tag == "audio"]
    assert 1 <= len(players) <= 5
    assert len(page.having("waveform")) >= 24
    images = [a for tag, a in page.elements if tag == "img"]
    assert len(images) == len(page.having("image")) >= 24
    assert all(max(int(a["width"]), int(a["height"])) == 160 for a in images)


@pytest.mark.parametrize(
    ("labels", "exits", "there", "gone"),
    [
        (LABELS, ("all",), ["exits", "classes", "confidence", "time", "samples"], ["ribbon", "story"]),
        ((), ("all",), ["exits", "time", "samples"], ["ribbon", "story", "histogram", "classes", "sure"]),
    ],
    ids=["no early exits", "embed"],
)
def test_sections_without_content_are_left_out(
    tmp_path: Path, labels: tuple[str, ...], exits: tuple[str, ...], there: list[str], gone: list[str]
) -> None:
    items = []
    for index in range(5):
        sample = write_media(tmp_path / "media", f"s{index}", "bag", random.Random(index))
        sample, prediction, seen = item(sample, [("bag", 0.9)], exits=exits)
        if not labels:
            prediction = Prediction(sample.id, "ok", answered_by="all", present=MODALITIES, used=MODALITIES)
            seen = []
        items.append((sample, prediction, seen))
    page = _report(tmp_path, tally_of(items, labels=labels, exits=exits))
    assert page.sections() == there
    assert not [name for name in gone if page.having(name)]
    assert "early" not in page.text
    assert len(page.having("card")) == 5


def test_a_run_of_nothing_and_one_where_all_failed(tmp_path: Path) -> None:
    nothing = _report(tmp_path, tally_of([]), seconds={}, items_per_second=0.0)
    assert nothing.sections() == []
    assert "No sample was run." in nothing.text
    samples = [Sample(f"s{index}", {"image": tmp_path / "x.jpg"}) for index in range(70)]
    failed = _report(tmp_path, tally_of([item(sample, [], failed={"image": "empty: 0 bytes"}) for sample in samples]))
    assert "70 samples, and none could be answered." in failed.text
    assert failed.sections() == ["exits", "time", "failures"]
    assert failed.text.count("image:empty: 0 bytes") == 50
    assert "And 20 more" in failed.text


def test_an_interrupted_run_says_so_first(tmp_path: Path) -> None:
    tally = tally_of(products(tmp_path / "media", rows=10))
    assert "interrupted" not in _report(tmp_path, tally).text
    text = _report(tmp_path, tally, interrupted=True).text
    assert 0 < text.index("This run was interrupted. It tells of the 10 samples") < text.index("Where samples left")


def test_thousands_of_labels_and_many_exits(tmp_path: Path) -> None:
    labels = tuple(f"class {index:04d}" for index in range(2000))
    exits = (*(f"image.layer{index}" for index in range(1, 13)), "all")
    items = []
    for index in range(120):
        seen = [(labels[index % 40], 0.3 + depth / 30) for depth in range(index % 13 + 1)]
        items.append(item(Sample(f"s{index}", {"image": tmp_path / "gone.jpg"}), seen, exits=exits))
    page = _report(tmp_path, tally_of(items, labels=labels, exits=exits))
    assert "And 10 classes more, with 30 answers." in page.text
    assert "1,960 labels of 2,000 got no answer" in page.text
    assert len(page.having("ribbon")) == 13
    # Twelve looks said the same, and opened one file: the first and the last are shown.
    assert "A deeper look (image.layer12) decided" in page.text
    assert "10 looks between, which changed nothing, are left out." in page.text


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    tally = tally_of(products(tmp_path / "media", rows=8))
    _report(tmp_path, tally)
    first = (tmp_path / "report.html").read_bytes()
    _report(tmp_path, tally)
    assert (tmp_path / "report.html").read_bytes() == first


def test_a_report_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    tally = tally_of([])
    (tmp_path / "report.html").mkdir()
    with pytest.raises(OSError):
        write_report(tmp_path / "report.html", tally, {}, title="x", thumbnails=True, limits=Limits())
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_time_is_told_by_part_and_adds_up() -> None:
    run = {"seconds": {"total": 10.0, "decode": 30.0, "waiting": 4.0, "fuse": 9.0, "write": 0.5,
                       "segments": {"image@0": 1.0, "image@1": 2.0, "head@0": 0.5}}}  # fmt: skip
    parts = time_parts(run)
    assert parts == {"waiting for media": 4.0, "image encoder": 3.0, "fusion head": 0.5, "writing results": 0.5,
                     "everything else": 2.0}  # fmt: skip
    assert next(iter(parts)) == "waiting for media"
    assert time_parts({}) == {}


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"waiting for media": 3.0, "image encoder": 1.0}, "the models waited for it 75% of the time"),
        # no single part is larger than the wait, but the models together are
        ({"waiting for media": 4.0, "audio encoder": 3.0, "image encoder": 2.0}, "the models took 56%"),
        ({"audio encoder": 3.0, "image encoder": 2.0}, "the audio encoder most of all"),
        ({"writing results": 3.0, "image encoder": 2.0}, "Writing results bounds this run"),
        ({"everything else": 3.0, "image encoder": 1.0}, "Neither models nor media bound this run: 75%"),
    ],
)
def test_what_bounds_a_run(parts: dict[str, float], said: str) -> None:
    assert said in bounded_by(parts)


@pytest.mark.parametrize(
    ("share", "said"), [(0, "0%"), (0.001, "<1%"), (0.5, "50%"), (0.994, "99%"), (0.9999, "99%"), (1, "100%")]
)
def test_nearly_all_is_not_all(share: float, said: str) -> None:
    assert percent(share) == said


@pytest.mark.parametrize(
    ("value", "said"),
    [(0.0042, "4 ms"), (0.141, "141 ms"), (3.21, "3.2 s"), (59.97, "60.0 s"), (200, "3 min 20 s"), (4000, "1 h 6 min")],
)
def test_seconds_in_words(value: float, said: str) -> None:
    assert seconds(value) == said
