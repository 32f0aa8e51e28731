"""Parts of media: what there is to see, and that a view is decoded as the whole is, within the same limits."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile
from PIL import Image

from mmpipe.errors import MediaError
from mmpipe.media import Limits, View, estimate_bytes, load, picture_size, sound_seconds
from mmpipe.media.views import of_picture, of_sound, of_text

RATE_HZ = 8000


@pytest.fixture
def steps(tmp_path):
    """A sound of ten seconds whose level says which second it is."""
    levels = np.repeat(np.arange(10, dtype=np.float32) / 10, RATE_HZ)

    def write(suffix, channels=1):
        path = tmp_path / f"steps{suffix}"
        soundfile.write(path, np.stack([levels] * channels, axis=1), RATE_HZ)
        return path

    return write, levels


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg"])
def test_a_window_of_a_sound_is_what_the_whole_has_there(steps, suffix):
    write, _ = steps
    path = write(suffix, channels=2)
    whole, _ = load("audio", path)
    part, rate_hz = load("audio", View(path, start=4.25), max_seconds=2.0)
    assert rate_hz == RATE_HZ
    assert len(part) == 2 * RATE_HZ
    assert np.abs(part - whole[34_000:50_000]).max() <= (0.02 if suffix == ".ogg" else 0)
    assert sound_seconds(path) == pytest.approx(10.0)


def test_a_window_of_a_sound_in_memory_and_of_bytes(steps):
    write, levels = steps
    part, _ = load("audio", View((levels, RATE_HZ), start=9.0), max_seconds=5.0)
    assert np.array_equal(part, levels[9 * RATE_HZ :])
    part, _ = load("audio", View(write(".wav").read_bytes(), start=3.0), max_seconds=1.0)
    assert part == pytest.approx(0.3, abs=1e-3)
    assert sound_seconds((levels, RATE_HZ)) == 10.0


def test_a_window_of_what_only_pyav_reads(tmp_path, steps):
    av = pytest.importorskip("av")
    _, levels = steps
    path = tmp_path / "steps.m4a"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=RATE_HZ, layout="mono")
        tone = (levels * np.sin(np.arange(len(levels)) * 0.5)).astype(np.float32)
        for start in range(0, len(tone), 1024):
            frame = av.AudioFrame.from_ndarray(tone[None, start : start + 1024], format="fltp", layout="mono")
            frame.rate, frame.pts = RATE_HZ, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    whole, _ = load("audio", path)
    part, _ = load("audio", View(path, start=6.0), max_seconds=1.5)
    assert np.array_equal(part, whole[6 * RATE_HZ : 6 * RATE_HZ + 12_000])
    assert sound_seconds(path) == pytest.approx(10.0, abs=0.3)


@pytest.mark.parametrize("start", [10.0, 400.0])
def test_a_window_past_the_end_is_refused(steps, start):
    with pytest.raises(MediaError):
        load("audio", View(steps[0](".wav"), start=start), max_seconds=2.0)


def test_the_limits_hold_for_a_view(steps):
    view = View(steps[0](".wav"), start=2.0)
    with pytest.raises(MediaError, match="too_large"):
        load("audio", view, limits=Limits(audio_minutes=0.1), max_seconds=1.0)
    assert estimate_bytes("audio", view, max_seconds=1.0) < estimate_bytes("audio", view)


def test_a_part_of_a_picture():
    pixels = np.arange(40 * 60, dtype=np.uint32).reshape(40, 60).astype(np.uint8)
    part = load("image", View(pixels, box=(0.5, 0.0, 1.0, 0.5), mirrored=True))
    assert np.array_equal(np.asarray(part)[:, :, 0], pixels[:20, 30:][:, ::-1])


def test_a_part_without_pixels_is_refused():
    with pytest.raises(MediaError, match="too small"):
        load("image", View(Image.new("RGB", (1, 1)), box=(0.1, 0.1, 0.4, 0.4)))


def test_an_error_names_the_file_once(tmp_path):
    with pytest.raises(MediaError) as caught:
        load("image", View(tmp_path / "none.jpg", mirrored=True))
    assert str(caught.value) == "image:not_found: none.jpg: no such file"


def test_a_picture_has_as_many_views_as_asked_for_all_different():
    for count in (2, 4, 24, 32):
        found = of_picture("a.jpg", count, (100, 100))
        assert found[0] == "a.jpg"
        assert len(set(found)) == len(found) == min(count, 25)


def test_the_ends_of_a_long_picture_come_first(tmp_path):
    found = of_picture("a.jpg", 4, (300, 100))
    assert [view.box for view in found[1:3]] == [(0, 0, 1 / 3, 1), (1 - 1 / 3, 0, 1, 1)]
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (300, 100)).save(tmp_path / "turned.jpg", exif=exif)
    assert picture_size(tmp_path / "turned.jpg") == load("image", tmp_path / "turned.jpg").size == (100, 300)
    assert picture_size(tmp_path / "none.jpg") is None
    assert picture_size(b"no picture") is None


def test_windows_of_a_sound_cover_it_and_no_more_than_asked_for():
    assert of_sound("a.wav", 4, 3.0, 3.5) == ["a.wav"]  # nothing more to hear
    assert of_sound("a.wav", 4, None, 3.5) == ["a.wav"]
    assert of_sound("a.wav", 4, 60.0, None) == ["a.wav"]  # all of it was heard
    assert of_sound("a.wav", 4, 3.6, 3.5) == ["a.wav"]  # a tenth of a second is no news
    assert [view.start for view in of_sound("a.wav", 4, 10.5, 3.5)[1:]] == [3.5, 7.0]
    assert [view.start for view in of_sound("a.wav", 4, 100.0, 10.0)[1:]] == [30.0, 60.0, 90.0]


def test_windows_of_a_text_begin_at_words():
    text = "one two three four five six seven eight nine ten"
    found = of_text("t", text, 8, lambda given: 14)
    assert [text[int(view.start) :].split()[0] for view in found[1:]] == ["three", "five", "eight"]
    assert of_text("t", text, 8, len) == ["t"]
    assert of_text("t", "a red mug...", 8, lambda given: 9) == ["t"]  # what ends it is no news
    assert load("text", View("one two", start=4)) == "two"
    with pytest.raises(MediaError, match="empty"):
        load("text", View("one two ", start=7))


def test_a_text_without_spaces_is_cut_anywhere():
    found = of_text("t", "文" * 100, 4, lambda given: 25)
    assert [view.start for view in found[1:]] == [25, 50, 75]
