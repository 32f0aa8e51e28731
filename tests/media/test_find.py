"""Every file of a folder is in one sample, or unmatched with a reason."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpipe.errors import InputError
from mmpipe.media import Listing, find


def tree(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return root


def found(listing: Listing, root: Path) -> dict[str, dict[str, str]]:
    return {s.id: {m: v.relative_to(root).as_posix() for m, v in s.media.items()} for s in listing.samples}


def test_by_stem(tmp_path: Path) -> None:
    tree(tmp_path, "a/b/4711.jpg", "a/b/4711.txt", "a/b/4711.wav", "v1.2.JPG", "v1.2.Txt", "B.md", "a.flac")
    listing = find(tmp_path)
    assert found(listing, tmp_path) == {
        "B": {"text": "B.md"},
        "a": {"audio": "a.flac"},
        "a/b/4711": {"image": "a/b/4711.jpg", "text": "a/b/4711.txt", "audio": "a/b/4711.wav"},
        "v1.2": {"image": "v1.2.JPG", "text": "v1.2.Txt"},
    }
    assert [s.id for s in listing.samples] == ["B", "a", "a/b/4711", "v1.2"]
    assert listing.counts == {"image": 2, "text": 3, "audio": 2}
    assert listing.combinations == {"image+text+audio": 1, "image+text": 1, "text": 1, "audio": 1}
    assert list(listing.samples[0].media) == ["text"]
    assert list(listing.samples[2].media) == ["image", "text", "audio"]
    assert listing.unmatched == ()


def test_samples_are_a_sequence(tmp_path: Path) -> None:
    samples = find(tree(tmp_path, *(f"{i}.txt" for i in range(9)))).samples
    assert len(samples) == 9
    assert [s.id for s in samples[2:4]] == ["2", "3"]
    assert samples[-1].id == "8"
    assert samples[0] == samples[0]
    with pytest.raises(IndexError):
        samples[9]


def test_by_folder(tmp_path: Path) -> None:
    tree(tmp_path, "4711/photo.jpg", "4711/title.txt", "x/y/note.m4a", "loose.jpg")
    listing = find(tmp_path, pair_by="folder")
    assert found(listing, tmp_path) == {
        "4711": {"image": "4711/photo.jpg", "text": "4711/title.txt"},
        "x/y": {"audio": "x/y/note.m4a"},
    }
    assert [path for path, _ in listing.unmatched] == ["loose.jpg"]
    assert "pair_by" in listing.unmatched[0][1]


def test_two_files_of_one_modality(tmp_path: Path) -> None:
    tree(tmp_path, "1.png", "1.jpg", "1.txt", "2.jpg", *(f"3.{kind}" for kind in ("tif", "png", "bmp", "webp", "gif")))
    with pytest.raises(
        InputError, match=r"item '1' has 2 files for image: 1.jpg, 1.png \(1 more[\s\S]*multiple: first"
    ):
        find(tmp_path)
    listing = find(tmp_path, multiple="first")
    assert found(listing, tmp_path)["1"] == {"image": "1.jpg", "text": "1.txt"}
    assert found(listing, tmp_path)["3"] == {"image": "3.bmp"}
    assert [path for path, _ in listing.unmatched] == ["1.png", "3.gif", "3.png", "3.tif", "3.webp"]
    assert listing.unmatched[0][1] == "item '1' already has the image '1.jpg'"


def test_what_is_left_out_has_a_reason(tmp_path: Path) -> None:
    tree(tmp_path, "1.jpg", "1.pdf", "README", ".hidden.jpg", ".git/x.jpg", "__MACOSX/1.jpg", "Thumbs.db", "n.wav")
    listing = find(tmp_path, modalities=("image",))
    assert dict(listing.unmatched) == {
        "1.pdf": "unknown suffix .pdf",
        "README": "no suffix",
        ".hidden.jpg": "hidden",
        ".git/": "hidden",
        "__MACOSX/": "hidden",
        "Thumbs.db": "hidden",
        "n.wav": "no encoder for audio in this configuration",
    }
    assert found(listing, tmp_path) == {"1": {"image": "1.jpg"}}
    assert listing.counts == {"image": 1}


@pytest.mark.parametrize(
    ("glob", "path", "item_id"),
    [
        ("{id}/photo*.jpg", "4711/photo-1.jpg", "4711"),
        ("{id}/photo*.jpg", "a/b/photo.jpg", "a/b"),
        ("{id}/photo*.jpg", "photo.jpg", None),
        ("{id}/photo*.jpg", "a/photo/x.jpg", None),
        ("{id}/photo*.jpg", "4711/photo.JPG", None),
        ("photos/{id}.jpg", "photos/a.b.jpg", "a.b"),
        ("{id}_*.jpg", "a_b_c.jpg", "a_b"),
        ("*/{id}.jpg", "x/y/z.jpg", "y/z"),
        ("**/{id}_front.png", "x/y_front.png", "x/y"),
        ("shop-?/{id}.[jp][pn]g", "shop-1/8.png", "8"),
        ("[!a]/{id}.jpg", "a/1.jpg", None),
        ("{id}/x+(1).jpg", "7/x+(1).jpg", "7"),
    ],
)
def test_pattern(tmp_path: Path, glob: str, path: str, item_id: str | None) -> None:
    tree(tmp_path, path)
    if item_id is None:
        with pytest.raises(InputError, match="no file fits"):
            find(tmp_path, pattern={"image": glob})
    else:
        assert found(find(tmp_path, pattern={"image": glob}), tmp_path) == {item_id: {"image": path}}


def test_pattern_pairs_across_folders(tmp_path: Path) -> None:
    tree(tmp_path, "img/1.jpg", "img/2.jpg", "titles/1.txt", "titles/old.bak", "snd/1.wav")
    listing = find(
        tmp_path,
        pattern={"image": "img/{id}.jpg", "text": "titles/{id}.txt", "audio": "snd/{id}.wav"},
        modalities=("image", "text"),
    )
    assert found(listing, tmp_path) == {
        "1": {"image": "img/1.jpg", "text": "titles/1.txt"},
        "2": {"image": "img/2.jpg"},
    }
    assert dict(listing.unmatched) == {
        "titles/old.bak": "fits no pattern",
        "snd/1.wav": "no encoder for audio in this configuration",
    }


@pytest.mark.parametrize("glob", ["*.jpg", "{id}/{id}.jpg", "/x/{id}.jpg", "../{id}.jpg", "{id}[z-a].jpg"])
def test_pattern_that_cannot_work(tmp_path: Path, glob: str) -> None:
    with pytest.raises(InputError, match=r"input\.pattern\.image"):
        find(tree(tmp_path, "a.jpg"), pattern={"image": glob})


def test_file_that_fits_two_patterns(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="more than one pattern"):
        find(tree(tmp_path, "a.txt"), pattern={"image": "{id}.*", "text": "{id}.txt"})


def test_no_samples_says_what_was_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="empty"):
        find(tmp_path)
    tree(tmp_path, "a.heic", "b.heic", "c.pdf", ".x")
    with pytest.raises(InputError, match=r"found 2 \.heic, 1 hidden, 1 \.pdf\n  looked for image: \.jpg") as info:
        find(tmp_path)
    assert str(tmp_path) in str(info.value)
    tree(tmp_path, "d.jpg")
    with pytest.raises(InputError, match="pair_by: stem"):
        find(tmp_path, pair_by="folder")
    with pytest.raises(InputError, match="`encoders`"):
        find(tmp_path, modalities=("audio",))


def test_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        find(tmp_path / "missing")
    (tmp_path / "items.csv").write_text("id,image\n")
    with pytest.raises(InputError, match=r"is a file.*input\.manifest"):
        find(tmp_path / "items.csv")


def test_links(tmp_path: Path) -> None:
    root = tree(tmp_path / "in", "real/1.jpg", "z/2.jpg")
    outside = tree(tmp_path / "out", "3.jpg")
    (root / "real/loop").symlink_to(root, target_is_directory=True)
    (root / "a").symlink_to(root / "z", target_is_directory=True)  # sorts before the real one, and still loses
    (root / "more").symlink_to(outside, target_is_directory=True)
    (root / "again").symlink_to(root / "real/1.jpg")
    (root / "4.jpg").symlink_to(outside / "3.jpg")
    (root / "gone.jpg").symlink_to(outside / "nothing")
    (root / "self.jpg").symlink_to(root / "self.jpg")
    os.mkfifo(root / "pipe.wav")
    for name in ("moreover", "m", "mo", "morea"):
        (root / name).symlink_to(outside, target_is_directory=True)
    listing = find(root)
    assert [s.id for s in listing.samples] == ["4", "gone", "m/3", "pipe", "real/1", "self", "z/2"]
    left = dict(listing.unmatched)
    assert {left.pop(f"{name}/") for name in ("mo", "more", "morea", "moreover")} == {left["a/"]}
    assert left == {
        "a/": "a link to a folder that is read already",
        "real/loop/": "a link to a folder that is read already",
        "again": "no suffix",
    }


def test_accents_pair_however_they_are_composed(tmp_path: Path) -> None:
    composed, apart = unicodedata.normalize("NFC", "caf\u00e9"), unicodedata.normalize("NFD", "caf\u00e9")
    tree(tmp_path, f"{composed}.jpg", f"{apart}.txt", "日本/写真.jpg")
    listing = find(tmp_path)
    assert [s.id for s in listing.samples] == [composed, "日本/写真"]
    assert all(path.exists() for sample in listing.samples for path in sample.media.values())


def test_names_that_are_no_text(tmp_path: Path) -> None:
    for name in (b"\xff\xfe.jpg", b"\xff\xfe.txt", b"\xe9.pdf"):
        Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name))).write_bytes(b"x")
    listing = find(tmp_path)
    assert [s.id for s in listing.samples] == ["\\xff\\xfe"]
    assert set(listing.samples[0].media) == {"image", "text"}
    assert listing.samples[0].media["image"].exists()
    assert listing.unmatched == (("\\xe9.pdf", "unknown suffix .pdf"),)


_NAMES = st.text(st.sampled_from("ab.é Z0_-"), min_size=1, max_size=4).filter(lambda name: name not in (".", ".."))
_SUFFIXES = st.sampled_from(["", ".jpg", ".JPG", ".png", ".txt", ".wav", ".pdf", "."])
_PATHS = st.lists(st.tuples(st.lists(_NAMES, max_size=2), _NAMES, _SUFFIXES), max_size=14)


def _has_use(path: str, pair_by: str, modalities: set[str]) -> bool:
    suffix, folder = path.lower().rpartition(".")[2], "/" in path
    of = {"jpg": "image", "png": "image", "txt": "text", "wav": "audio"}.get(suffix)
    hidden = any(part.startswith(".") for part in path.split("/"))
    return of in modalities and not hidden and (folder or pair_by == "stem")


@settings(max_examples=120, deadline=None)
@given(
    paths=_PATHS, pair_by=st.sampled_from(["stem", "folder"]), modalities=st.sets(st.sampled_from(["image", "text"]))
)
def test_no_file_is_lost_or_used_twice(
    paths: list[tuple[list[str], str, str]], pair_by: str, modalities: set[str]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for parents, stem, suffix in paths:
            path = root.joinpath(*parents, stem + suffix)
            try:
                tree(root, path.relative_to(root).as_posix())
            except OSError:
                continue  # a folder and a file of one name
        files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
        try:
            listing = find(root, pair_by=pair_by, multiple="first", modalities=tuple(modalities) or ("audio",))
        except InputError:
            assert not any(_has_use(path, pair_by, modalities or {"audio"}) for path in files)
            return
        used = [path for media in found(listing, root).values() for path in media.values()]
        left = [path for path, _ in listing.unmatched]
        closed = tuple(path for path in left if path.endswith("/"))
        covered = [path for path in files if path.startswith(closed)]
        assert sorted(used + [path for path in left if not path.endswith("/")] + covered) == files
        ids = [sample.id for sample in listing.samples]
        assert ids == sorted(set(ids), key=lambda item_id: item_id.encode("utf-8"))


def test_a_thousand_items_without_heavy_imports(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from mmpipe.media import find\n"
        "listing = find(sys.argv[1])\n"
        "assert len(listing.samples) == 1000, len(listing.samples)\n"
        "assert not {'torch', 'numpy', 'PIL', 'soundfile', 'pyarrow'} & set(sys.modules)\n"
    )
    for i in range(1000):
        (tmp_path / f"{i}.jpg").touch()
        (tmp_path / f"{i}.txt").touch()
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60)
