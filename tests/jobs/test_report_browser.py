"""What a person sees: the report in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from support.browser import Page, browser, chromium
from support.report_run import products, run_of, tally_of

from mmpipe.jobs.report import write_report
from mmpipe.jobs.tally import Tally
from mmpipe.media import Limits
from mmpipe.types import Prediction, Sample

PROGRAM = chromium()
pytestmark = [pytest.mark.browser, pytest.mark.skipif(PROGRAM is None, reason="there is no Chromium")]

# Elements whose own text is too faint for its background, as WCAG AA counts it (4.5 : 1).
_FAINT = """(() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = c => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = c; canvas.fillRect(0, 0, 1, 1);
                      return canvas.getImageData(0, 0, 1, 1).data };
  const light = c => [...c].slice(0, 3).map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
                           .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const ground = e => { for (; e; e = e.parentElement) { const c = rgba(getComputedStyle(e).backgroundColor);
                        if (c[3] == 255) return c } return rgba('white') };
  return [...document.querySelectorAll('body *')]
    .filter(e => !e.closest('svg') && [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim()))
    .map(e => { const a = light(rgba(getComputedStyle(e).color)), b = light(ground(e));
                return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), e.textContent] })
    .filter(([ratio]) => ratio < 4.5)
})()"""


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tally]:
    folder = tmp_path_factory.mktemp("report")
    tally = tally_of(products(folder / "media"))
    path = folder / "report.html"
    write_report(path, tally, run_of(tally), title="products", thumbnails=True, limits=Limits())
    return path, tally


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    assert PROGRAM is not None
    with browser(PROGRAM, tmp_path_factory.mktemp("profile")) as tab:
        yield tab


def test_a_person_sees_the_run(page: Page, shown: tuple[Path, Tally]) -> None:
    path, tally = shown
    page.events.clear()
    page.show(path)
    assert page.value("document.title") == "products – mmpipe report"
    early = tally.answered_by["image"]
    assert page.value("document.querySelector('h1').innerText").replace("\n", " ") == (
        f"62 samples: 61 answered, {early} of them from the image alone."
    )
    assert page.value("document.querySelectorAll('.ribbon').length") == 4
    assert page.value("[...document.querySelectorAll('.story h3')].map(e => e.innerText)") == [
        "The image was enough", "The text decided", "The audio settled it"
    ]  # fmt: skip
    assert page.value("[...document.images].every(i => i.naturalWidth > 0)")
    assert page.value("document.images.length") >= 20
    assert page.value("[...document.querySelectorAll('audio')].every(a => a.duration > .5 && !a.error)")
    assert page.value("document.querySelectorAll('audio').length") >= 8
    # An exit's part of the drawing is as high as its share of the samples.
    heights = page.value("[...document.querySelectorAll('.flow > rect')].map(r => r.getBoundingClientRect().height)")
    whole, first = heights[0], heights[1]
    assert first / whole == pytest.approx(early / 62, abs=0.03)


def test_the_drawing_stands_above_its_numbers(page: Page, shown: tuple[Path, Tally]) -> None:
    for width in (1200, 400):
        page.show(shown[0], width=width)
        ends, labels = (
            page.value(f"[...document.querySelectorAll('{boxes}')].map(e => e.getBoundingClientRect().left)")
            for boxes in (".flow > rect", ".flow-labels > div")
        )
        assert ends == pytest.approx(labels, abs=1)


def test_nothing_is_fetched_and_nothing_refused(page: Page, shown: tuple[Path, Tally]) -> None:
    page.events.clear()
    page.show(shown[0])
    requests = [e["params"]["request"]["url"] for e in page.events if e["method"] == "Network.requestWillBeSent"]
    assert shown[0].as_uri() in requests
    assert [url for url in requests if not url.startswith("data:")] == [shown[0].as_uri()]
    said = [e for e in page.events if e["method"] in ("Log.entryAdded", "Runtime.consoleAPICalled")]
    assert said == []  # a breach of the page's policy would be an entry


@pytest.mark.parametrize("width", [400, 768, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_screen_can_read_it(
    page: Page, shown: tuple[Path, Tally], tmp_path: Path, width: int, scheme: str
) -> None:
    page.show(shown[0], width=width, scheme=scheme)
    assert page.value("document.documentElement.scrollWidth") <= width
    assert page.value(_FAINT) == []
    # Nothing sticks out of the page, but in boxes that scroll by themselves.
    assert page.value(
        "[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, .trace, svg, audio')"
        " && e.getBoundingClientRect().right > innerWidth).map(e => e.outerHTML.slice(0, 80))"
    ) == []  # fmt: skip
    with Image.open(page.screenshot(tmp_path / "page.png")) as picture:
        corner = picture.convert("L").getpixel((3, 3))
    assert isinstance(corner, int)
    assert (corner < 60) == (scheme == "dark")


def test_hostile_words_stay_words(page: Page, tmp_path: Path) -> None:
    words = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>\u202e"
    prediction = Prediction(
        words, "ok", label=words, confidence=0.9, answered_by="all", present=("text",), used=("text",)
    )  # fmt: skip
    tally = tally_of([(Sample(words, {"text": words}), prediction, [(words, 0.9)])], labels=(words,), exits=("all",))
    path = tmp_path / "report.html"
    write_report(path, tally, run_of(tally, notes=[words]), title=words, thumbnails=True, limits=Limits())
    page.show(path)
    assert page.value("document.title") == words + " – mmpipe report"
    assert page.value("document.images.length + document.scripts.length") == 0
