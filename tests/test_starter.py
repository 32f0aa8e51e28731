"""`mmpipe init`: folders as people have them → a configuration that loads and pairs them."""

from __future__ import annotations

import pytest

from mmpipe.config import load
from mmpipe.errors import InputError, OutputError
from mmpipe.listing import find_samples, input_root
from mmpipe.starter import BLANK_LABELS, write_starter

STEMS = [f"{number}.{suffix}" for number in (1, 2, 3) for suffix in ("jpg", "txt", "wav")]
FOLDERS = [f"{number}/{name}" for number in (47, 48) for name in ("photo.jpg", "title.txt", "note.m4a")]


def lay(root, names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return root


def begun(folder, output=None, **options):
    """(Starter, Config, its listing): what init wrote works with check."""
    starter = write_starter(folder, output, force=options.get("force", False))
    config = load(starter.path)
    listing = find_samples(config)
    assert [sample.id for sample in listing.samples] == [sample.id for sample in starter.pairing.listing.samples]
    assert list(config.modalities) == list(starter.pairing.modalities)
    assert input_root(config).resolve() == folder.resolve()
    return starter, config, listing


@pytest.mark.parametrize(
    ("names", "pair_by", "multiple", "items", "counts"),
    [
        (STEMS, "stem", "error", 3, {"image": 3, "text": 3, "audio": 3}),
        ([f"a/b/{name}" for name in STEMS], "stem", "error", 3, {"image": 3, "text": 3, "audio": 3}),
        (FOLDERS, "folder", "error", 2, {"image": 2, "text": 2, "audio": 2}),
        ([f"2024/x/{name}" for name in FOLDERS], "folder", "error", 2, {"image": 2, "text": 2, "audio": 2}),
        (["1.jpg", "2.jpeg", "3.PNG"], "stem", "error", 3, {"image": 3}),
        (["a.wav", "deep/b.flac"], "stem", "error", 2, {"audio": 2}),
        (["a.txt", "b.txt"], "stem", "error", 2, {"text": 2}),
        ([*STEMS, ".DS_Store", "a/.DS_Store", "Thumbs.db"], "stem", "error", 3, {"image": 3, "text": 3, "audio": 3}),
        (["1.jpg", "1.png", "1.txt", "2.jpg", "2.txt"], "stem", "first", 2, {"image": 2, "text": 2}),
        (
            ["1/a.jpg", "1/b.jpg", "1/t.txt", "2/a.jpg", "2/b.jpg", "2/t.txt"],
            "folder",
            "first",
            2,
            {"image": 2, "text": 2},
        ),
        (
            [f"{a}/{b}" for a in ("cats", "dogs") for b in ("1.jpg", "2.jpg", "3.jpg", "notes.txt")],
            "stem",
            "error",
            8,
            {"image": 6, "text": 2},
        ),
        ([*FOLDERS, "cover.jpg"], "folder", "error", 2, {"image": 2, "text": 2, "audio": 2}),
        (['my photo\'s "best".jpg', 'my photo\'s "best".txt'], "stem", "error", 1, {"image": 1, "text": 1}),
        (["größe 靴 👟.jpg", "größe 靴 👟.txt"], "stem", "error", 1, {"image": 1, "text": 1}),
    ],
)
def test_layouts(tmp_path, names, pair_by, multiple, items, counts):
    starter, config, listing = begun(lay(tmp_path / "media", names))
    assert (config.input.pair_by, config.input.multiple) == (pair_by, multiple)
    assert len(listing.samples) == items
    assert {modality: count for modality, count in listing.counts.items() if count} == counts
    assert starter.path == tmp_path / "media/mmpipe.yaml"


def test_a_folder_for_each_modality(tmp_path):
    names = ["photos [1]/1.jpg", "photos [1]/2.png", "texts/1.txt", "texts/2.md", "sounds/a b/1.wav"]
    _, config, listing = begun(lay(tmp_path / "media", names))
    assert dict(config.input.pattern) == {
        "image": "photos [[]1]/{id}.*",
        "text": "texts/{id}.*",
        "audio": "sounds/a b/{id}.*",
    }
    assert [sample.id for sample in listing.samples] == ["1", "2"]
    assert dict(listing.counts) == {"image": 2, "text": 2, "audio": 1}


@pytest.mark.parametrize(
    "name",
    ["plain", "with space", "it's", 'say "hi"', "a: b #c", "größe 靴", "line\nbreak", "[red]x", "\x1b[2J", "-x"],
)
def test_names_of_folders_that_need_care(tmp_path, name):
    folder = lay(tmp_path / name, STEMS)
    starter, config, _ = begun(folder, tmp_path / "made.yaml")
    assert "\x1b" not in starter.path.read_text()
    assert config.output_folder.name == name
    begun(folder)


def test_folders_that_look_like_classes_become_labels(tmp_path):
    names = [f"{folder}/{number}.jpg" for folder in ("alley_cats", "dogs", "no") for number in range(3)]
    starter, config, _ = begun(lay(tmp_path / "media", names))
    assert config.all_labels == ("alley cats", "dogs", "no")
    assert any("folders" in note for note in starter.notes)


@pytest.mark.parametrize(
    "names",
    [
        ["cats/1.jpg", "cats/2.jpg"],  # one folder
        ["cats/1.jpg", "dogs/1.jpg", "9.jpg"],  # some outside
        [f"{number}/1.jpg" for number in range(60)],  # one item each
        [f"{number}/{name}.jpg" for number in range(60) for name in "ab"],  # too many
        [f"{folder}/{n}_x.{suffix}" for folder, suffix in (("photos", "jpg"), ("texts", "txt")) for n in "12"],  # kinds
    ],
)
def test_other_folders_do_not(tmp_path, names):
    _, config, _ = begun(lay(tmp_path / "media", names))
    assert config.all_labels == BLANK_LABELS


def test_notes_say_what_is_left_out_and_what_lies_around(tmp_path):
    starter, _, listing = begun(lay(tmp_path / "media", [*STEMS, "1.png", "README.md", "items.csv"]))
    notes = "\n".join(starter.notes)
    assert "1 files are left out" in notes
    assert "README would be read as a text" in notes
    assert (
        f"items.csv may be a table of the items: to read that instead, mmpipe check CONFIG --input {tmp_path}" in notes
    )
    assert len(listing.samples) == 4


def test_the_output_is_never_inside_the_folder(tmp_path, monkeypatch):
    folder = lay(tmp_path / "media", STEMS)
    for place in (tmp_path, folder, tmp_path / "elsewhere"):
        place.mkdir(exist_ok=True)
        monkeypatch.chdir(place)
        _, config, _ = begun(folder, force=True)
        assert not config.output_folder.resolve().is_relative_to(folder)


def test_results_of_an_earlier_run_are_no_media(tmp_path):
    lay(tmp_path / "media", [*STEMS, "out/predictions/part-00000.parquet", "out/run.json", "out/report.html"])
    starter, _, listing = begun(tmp_path / "media")
    assert len(listing.samples) == 3
    assert starter.notes == ()


def test_nothing_is_overwritten_without_force(tmp_path):
    folder = lay(tmp_path / "media", STEMS)
    (folder / "mmpipe.yaml").write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        write_starter(folder, None, force=False)
    assert (folder / "mmpipe.yaml").read_text() == "mine"
    begun(folder, force=True)


@pytest.mark.parametrize("output", ["no/such/folder/x.yaml", "x\0.yaml", "folder"])
def test_a_place_that_can_not_be_written_to(tmp_path, output):
    folder = lay(tmp_path / "media", STEMS)
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError):
        write_starter(folder, tmp_path / output, force=output == "folder")


@pytest.mark.parametrize("names", [[], ["a.pdf"], [".hidden.jpg"]])
def test_folders_without_media_are_refused_and_nothing_is_written(tmp_path, names):
    folder = lay(tmp_path / "media", names)
    folder.mkdir(exist_ok=True)
    with pytest.raises(InputError, match="no samples"):
        write_starter(folder, None, force=False)
    assert not (folder / "mmpipe.yaml").exists()
    with pytest.raises(InputError, match="no such folder"):
        write_starter(tmp_path / "nowhere", None, force=False)


def test_the_configuration_that_init_wrote_is_no_stray_file(tmp_path):
    _, _, listing = begun(lay(tmp_path / "media", [*STEMS, "notes.xyz"]))
    assert [name for name, _ in listing.unmatched] == ["notes.xyz"]
