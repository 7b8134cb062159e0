"""Finding image files: layouts, order, digest, and what is refused."""

import os
from pathlib import Path

import pytest
import torch

from synco_fast.data.index import held_out, scan
from synco_fast.errors import UserError


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


def test_split_of_class_folders(jpeg_root: Path) -> None:
    index = scan(jpeg_root)
    assert len(index) == 60
    assert index.classes == ("ant", "bee", "cat", "dog")
    assert list(index.files) == sorted(index.files)
    assert index.labels is not None and index.labels.dtype == torch.int64
    assert torch.bincount(index.labels).tolist() == [15] * 4
    for i, file in enumerate(index.files):
        assert file.split("/")[0] == index.classes[index.labels[i]]
        assert index.path(i).is_file()


def test_the_split_folder_can_be_named_directly(jpeg_root: Path) -> None:
    assert scan(jpeg_root).digest == scan(jpeg_root / "train").digest


def test_held_out(jpeg_root: Path, tmp_path: Path) -> None:
    index = held_out(jpeg_root)
    assert index is not None and len(index) == 12 and index.root == jpeg_root / "val"
    touch(tmp_path, "test/a/1.jpg", "train/a/1.jpg")
    index = held_out(tmp_path)
    assert index is not None and index.root == tmp_path / "test"
    assert held_out(jpeg_root / "train") is None


def test_flat_folder_takes_image_suffixes_only(tmp_path: Path) -> None:
    suffixes = ("jpg", "JPEG", "png", "bmp", "webp", "tif", "TIFF", "ppm", "GIF")
    touch(tmp_path, *(f"x.{suffix}" for suffix in suffixes), "notes.txt", ".hidden.jpg", "deep/er/1.jpg")
    index = scan(tmp_path)
    assert index.files == tuple(sorted(f"x.{suffix}" for suffix in suffixes))
    assert index.labels is None and index.classes == ()


def test_take(jpeg_root: Path) -> None:
    index = scan(jpeg_root)
    part = index.take([31, 2])
    assert part.files == (index.files[31], index.files[2])
    assert part.labels is not None and part.labels.tolist() == [2, 0]
    assert part.digest != index.digest


def test_digest_covers_files_and_labels(tmp_path: Path) -> None:
    touch(tmp_path / "one", "a/1.jpg", "b/2.jpg")
    touch(tmp_path / "two", "a/1.jpg", "b/2.jpg")
    first = scan(tmp_path / "one")
    assert first.digest == scan(tmp_path / "two").digest
    touch(tmp_path / "two", "b/3.jpg")
    assert first.digest != scan(tmp_path / "two").digest
    (tmp_path / "one" / "list.txt").write_text("a/1.jpg\t0\nb/2.jpg\t1\n")
    (tmp_path / "one" / "swapped.txt").write_text("a/1.jpg\t1\nb/2.jpg\t0\n")
    assert scan(tmp_path / "one" / "list.txt").digest == first.digest
    assert scan(tmp_path / "one" / "swapped.txt").digest != first.digest


def test_file_list(tmp_path: Path) -> None:
    touch(tmp_path, "b/2.jpg", "a/1.jpg", "a/unlisted.jpg", "c 3.png")
    listing = tmp_path / "list.txt"
    listing.write_text("b/2.jpg\t2\n\n./a/1.jpg\t0\nc 3.png\t2\n")
    index = scan(listing)
    assert index.files == ("a/1.jpg", "b/2.jpg", "c 3.png")
    assert index.labels is not None and index.labels.tolist() == [0, 1, 1]
    assert index.classes == ("0", "2")
    assert index.path(0).is_file()
    text = listing.read_text().replace("\t2", "\t9999999")
    listing.write_text(text, encoding="utf-8-sig")  # with the mark that some editors put first
    assert scan(listing).classes == ("0", "9999999")
    listing.write_text("b/2.jpg\na/1.jpg\n")
    assert scan(listing).labels is None


def test_only_files_are_images(tmp_path: Path) -> None:
    """Nobody waits for a pipe that is named like an image."""
    touch(tmp_path, "a.jpg")
    os.mkfifo(tmp_path / "b.jpg")
    assert scan(tmp_path).files == ("a.jpg",)


def test_a_list_beside_the_splits(jpeg_root: Path, tmp_path: Path) -> None:
    """Classes have their folders' names where each has a folder, and the held-out split is found."""
    (tmp_path / "train").symlink_to(jpeg_root / "train")
    (tmp_path / "val").symlink_to(jpeg_root / "val")
    index = scan(tmp_path)
    assert index.labels is not None
    lines = [f"train/{file}\t{label}\n" for file, label in zip(index.files, index.labels.tolist(), strict=True)]
    listing = tmp_path / "list.txt"
    listing.write_text("".join(lines[1:]))
    assert scan(listing).classes == index.classes
    held = held_out(listing)
    assert held is not None and held.digest == scan(tmp_path, "val").digest
    listing.write_text("".join(lines[:15] + lines[30:]))  # a class is missing
    assert scan(listing).classes == ("ant", "cat", "dog")
    listing.write_text("".join([*lines, f"val/{held.files[0]}\t0\n"]))  # a class is in two folders
    assert scan(listing).classes == ("0", "1", "2", "3")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "names no files"),
        ("a.jpg\nmissing.jpg\n", "1 files that do not exist: missing.jpg"),
        ("../a.jpg\n", "line 1: ../a.jpg lies outside"),
        ("b/../../a.jpg\n", "lies outside"),
        ("/a.jpg\n", "lies outside"),
        ("a.jpg\nb/b.jpg\nb/../a.jpg\n", "more than once: a.jpg"),
        ("a.jpg\t0\nb/b.jpg\n", "labels 1 of 2"),
        ("a.jpg\tcat\n", "'cat' is not a class number"),
        ("a.jpg\t-1\n", "'-1' is not a class number"),
        ("notes.txt\n", "not an image name"),
    ],
)
def test_bad_file_list(tmp_path: Path, content: str, message: str) -> None:
    touch(tmp_path, "a.jpg", "b/b.jpg")
    (tmp_path / "list.txt").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        scan(tmp_path / "list.txt")
    assert "list.txt" in str(caught.value)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "is empty"),
        (["a.txt", "b.csv", "c.txt", "d.txt"], "found a.txt, b.csv, c.txt and 1 more"),
        (["a/notes.txt"], "found a/notes.txt"),
        (["a/b/c/1.jpg"], "found a/b/"),
        (["1.jpg", "a/2.jpg"], "both images .* and folders of images"),
        (["test/a/1.jpg"], "has test/ but no train/"),
    ],
)
def test_unusable_folder(tmp_path: Path, names: list[str], message: str) -> None:
    touch(tmp_path, *names)
    with pytest.raises(UserError, match=message) as caught:
        scan(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_missing_folder_and_wrong_kinds_of_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        scan(tmp_path / "nowhere")
    touch(tmp_path, "one.jpg")
    with pytest.raises(UserError, match="single image"):
        scan(tmp_path / "one.jpg")
    (tmp_path / "binary").write_bytes(bytes(range(128, 256)))
    with pytest.raises(UserError, match="not UTF-8"):
        scan(tmp_path / "binary")
