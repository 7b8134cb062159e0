"""Lists as written and read back, and lists that are wrong."""

import shutil
from pathlib import Path

import pytest
import torch

from synco_fast.data.index import Index, held_out, scan
from synco_fast.data.listing import write_list
from synco_fast.data.samples import read_bytes
from synco_fast.errors import UserError
from tests.command import call, check_error
from tests.formats import tar_with_folders, write_tar


@pytest.fixture
def folder(jpeg_root: Path, tmp_path: Path) -> Index:
    shutil.copytree(jpeg_root / "train", tmp_path / "data" / "images")
    return scan(tmp_path / "data" / "images")


def check_same_index(ours: Index, theirs: Index) -> None:
    assert (ours.digest, ours.files, ours.classes) == (theirs.digest, theirs.files, theirs.classes)
    assert (ours.labels is None) == (theirs.labels is None)
    assert [read_bytes(ours.sample(i)) for i in range(len(ours))] == [
        read_bytes(theirs.sample(i)) for i in range(len(theirs))
    ]


@pytest.mark.parametrize("place", ["data/images", "data", "", "elsewhere"])
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("shards", [True, False])
def test_round_trip(shards: bool, labelled: bool, place: str, folder: Index, tmp_path: Path) -> None:
    """In the folder of the images, above it or elsewhere, moved along with the images or not."""
    index = scan(tar_with_folders(folder, tmp_path / "data" / "images" / "shards")) if shards else folder
    if not labelled:
        index = Index(index.root, index.files, None, (), index.shards, index.extents)
    listing = tmp_path / place / "list.tsv"
    listing.parent.mkdir(exist_ok=True)
    write_list(index, listing)
    check_same_index(scan(listing), index)
    if place != "elsewhere":
        shutil.copytree(tmp_path / "data", tmp_path / "moved" / "data")
        moved = tmp_path / "moved" / place / "list.tsv"
        if place == "":
            shutil.copy(listing, moved)
        check_same_index(scan(moved), index)
        assert scan(moved).root.is_relative_to(tmp_path / "moved")
    assert held_out(listing) is None


def test_some_of_the_images(folder: Index, tmp_path: Path) -> None:
    """A class that lost its images keeps its number and name."""
    kept = [i for i, name in enumerate(folder.files) if not name.startswith("bee") and i % 3]
    for index in (folder, scan(tar_with_folders(folder, tmp_path / "shards"))):
        write_list(index.take(kept), tmp_path / "list.tsv")
        found = scan(tmp_path / "list.tsv")
        check_same_index(found, index.take(kept))
        assert found.classes == ("ant", "bee", "cat", "dog")
        assert found.labels is not None and set(found.labels.tolist()) == {0, 2, 3}


def test_lines_in_any_order(folder: Index, tmp_path: Path) -> None:
    for number, index in enumerate((folder, scan(tar_with_folders(folder, tmp_path / "shards")))):
        listing = tmp_path / f"{number}.tsv"
        write_list(index, listing)
        lines = listing.read_text().splitlines()
        listing.write_text("\r\n".join(["# a remark", *reversed(lines), ""]))
        check_same_index(scan(listing), index)


@pytest.mark.parametrize("name", ["a\tb.jpg", "a\nb.jpg", " a.jpg", "# a.jpg", b"\xff.jpg"])
def test_names_that_cannot_be_listed(name: str | bytes, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / (name if isinstance(name, str) else name.decode(errors="surrogateescape"))
    path.write_bytes(b"x")
    with pytest.raises(UserError, match="rename it"):
        write_list(scan(tmp_path / "data"), tmp_path / "list.tsv")
    assert not (tmp_path / "list.tsv").exists()


def lines(*fields: tuple[object, ...]) -> str:
    return "".join("\t".join(map(str, line)) + "\n" for line in fields)


ONE = ("x.tar", 0, 512, 700, "a.jpg")
TWO = ("x.tar", 1, 2048, 700, "b.jpg")
WRONG: dict[str, tuple[str, tuple[str, ...]]] = {
    "three fields": (lines(ONE, TWO[:3]), ("line 2", "3 fields", "offset")),
    "offset": (lines(("x.tar", 0, "-512", 700, "a.jpg")), ("line 1", "offset '-512'")),
    "length": (lines(("x.tar", 0, 512, "7e2", "a.jpg")), ("line 1", "length '7e2'")),
    "huge offset": (lines(("x.tar", 0, "9" * 30, 700, "a.jpg")), ("line 1", "offset")),
    "beyond the end": (lines(ONE, ("x.tar", 1, 10000, 700, "b.jpg")), ("x.tar: b.jpg", "10000", "beyond")),
    "same bytes twice": (lines(ONE, ONE), ("x.tar: a.jpg", "twice")),
    "missing shard": (lines(ONE, ("y.tar", *TWO[1:])), ("y.tar", "No such file")),
    "outside": (lines(("../x.tar", *ONE[1:])), ("line 1", "../x.tar lies outside")),
    "absolute": (lines(("/x.tar", *ONE[1:])), ("line 1", "/x.tar lies outside")),
    "labels on some": (lines(ONE, ("x.tar", "", *TWO[2:])), ("labels 1 of 2",)),
    "label": (lines(("x.tar", "cat", *ONE[2:])), ("line 1", "'cat'")),
    "huge label": ("a.jpg\t" + "9" * 30 + "\n", ("line 1", "class number")),
    "files and shards": (lines(ONE, ("a.jpg", 1)), ("both images in files",)),
    "size": (lines(("# shard", "x.tar", 99), ONE), ("x.tar has 10240 bytes, but 99", "list.tsv")),
    "size that is no number": (lines(("# shard", "x.tar", "big"), ONE), ("line 1", "size 'big'")),
    "class twice": (lines(("# class", 0, "a"), ("# class", 0, "b"), ONE), ("line 2", "'b'")),
    "class that is a path": (lines(("# class", 0, ".."), ONE), ("line 1", "'..'")),
    "class without a name": (lines(("# class", 0, "a"), ONE, TWO), ("1 classes", "not class 1")),
    "root that is not there": (lines(("# root", "gone"), ONE), ("gone/x.tar",)),
    "remarks only": ("# nothing\n", ("names no files",)),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong(kind: str, tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [("a.jpg", b"x" * 700), ("b.jpg", b"y" * 700)])
    (tmp_path / "a.jpg").write_bytes(b"x")
    content, names = WRONG[kind]
    (tmp_path / "list.tsv").write_text(content)
    done = call("data", "stats", tmp_path / "list.tsv")
    check_error(done.code, done.err, ("list.tsv", *names))
    assert (done.code, done.out) == (1, "")


def test_a_list_of_shards_by_hand(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [("a.jpg", b"x" * 700), ("b.jpg", b"y" * 700)])
    (tmp_path / "list.tsv").write_text(lines(TWO, ONE))
    index = scan(tmp_path / "list.tsv")
    assert [read_bytes(index.sample(i)) for i in range(2)] == [b"x" * 700, b"y" * 700]
    assert index.files == ("a.jpg", "b.jpg") and index.classes == ("0", "1")
    assert index.labels is not None and index.labels.dtype == torch.int64
