"""What a person sees: the explain page in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.browser import Page, browser, chromium
from support.explained import explained, plan

from mmpipe.explain.page import render
from mmpipe.graphs.draw import as_svg

PROGRAM = chromium()
pytestmark = [pytest.mark.browser, pytest.mark.skipif(PROGRAM is None, reason="there is no Chromium")]

WIDTHS = (390, 1280)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("explain") / "explain.html"
    path.write_text(render(explained()), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    assert PROGRAM is not None
    with browser(PROGRAM, tmp_path_factory.mktemp("profile")) as tab:
        yield tab


def complaints(page: Page) -> list[str]:
    return [str(event) for event in page.events if event["method"] in ("Log.entryAdded", "Runtime.consoleAPICalled")]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_every_screen_can_read_it(page: Page, path: Path, width: int, scheme: str) -> None:
    page.events.clear()
    page.show(path, width=width, scheme=scheme)
    assert complaints(page) == []
    asked = [e["params"]["request"]["url"] for e in page.events if e["method"] == "Network.requestWillBeSent"]
    assert asked == [path.as_uri()]
    assert page.value("document.documentElement.scrollWidth") <= width
    assert page.value(
        "[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, svg')"
        " && e.getBoundingClientRect().right > innerWidth).map(e => e.outerHTML.slice(0, 80))"
    ) == []  # fmt: skip
    ink, paper = (
        page.value(f"getComputedStyle(document.querySelector('{where}')).{what}.match(/\\d+/)[0]")
        for where, what in ((".mmplan text", "fill"), ("body", "backgroundColor"))
    )
    assert (int(ink) < int(paper)) == (scheme == "light")


def test_the_slowest_is_seen_without_scrolling(page: Page, path: Path) -> None:
    page.show(path, width=1280, height=900)
    assert page.value("document.querySelector('.segments tbody tr').getBoundingClientRect().bottom") <= 900
    assert page.value("document.querySelector('.segments tbody tr .chip').innerText") == "image@0"
    assert page.value("document.querySelector('.segments').getBoundingClientRect().right") <= 1280 - 120


def test_drawings_have_their_size(page: Page, path: Path) -> None:
    page.show(path, width=1280)
    boxes = page.value("[...document.querySelectorAll('.mmplan .box')].map(e => e.getBoundingClientRect().width)")
    assert len(boxes) == 6
    assert min(boxes) > 70
    left, width, whole = page.value(
        "(([map, first]) => [first.left - map.left, first.width, map.width])"
        "(['.map', '.map .buffer'].map(e => document.querySelector(e).getBoundingClientRect()))"
    )
    assert (left, width / whole) == pytest.approx((0, 2 / 6), abs=0.01)  # written by step 0 of 6, read by step 1


def test_hostile_words_stay_words(page: Page, tmp_path: Path) -> None:
    words = "<script>document.title='taken'</script>"
    made = plan()
    named = replace(made, segments=(replace(made.segments[0], name=words), *made.segments[1:]))
    facts = explained(title=words, verdict=words, machine=words, svg=as_svg(named, seconds={words: 1.0}))
    facts["segments"][0] |= {"name": words, "backend": words}
    facts["pool"]["stages"][0]["buffers"][0]["name"] = words
    path = tmp_path / "explain.html"
    path.write_text(render(facts), encoding="utf-8")
    page.events.clear()
    page.show(path, width=WIDTHS[0])
    assert page.value("document.title") == words + " – mmpipe explain"
    assert page.value("document.scripts.length") == 0
    assert page.value("document.querySelector('h1').innerText") == words
    assert page.value("document.documentElement.scrollWidth") <= WIDTHS[0]
    assert complaints(page) == []
