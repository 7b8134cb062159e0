"""Subsets of a labelled set: drawn, held back from, listed."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from synco_fast.data.index import Index
from synco_fast.errors import UserError
from synco_fast.evaluation.subset import check_classes, draw, hold_back, listed_names, named_by, write_names

LABELS = torch.tensor([0] * 100 + [1] * 7 + [2] * 1 + [3] * 260)


def counts(labels: Tensor) -> list[int]:
    return labels.bincount(minlength=4).tolist()


@pytest.mark.parametrize(
    ("fraction", "expected"),
    [(1.0, [100, 7, 1, 260]), (0.1, [10, 1, 1, 26]), (0.01, [1, 1, 1, 3]), (0.5, [50, 4, 1, 130])],
)
def test_drawn_from_each_class_alike(fraction: float, expected: list[int]) -> None:
    rows = draw(LABELS, fraction, seed=3)
    assert rows == sorted(set(rows)) and counts(LABELS[rows]) == expected
    assert rows == draw(LABELS, fraction, seed=3)
    assert fraction == 1 or rows != draw(LABELS, fraction, seed=4)


def test_every_image_is_drawn_as_often() -> None:
    """1 of 7 images in 2,000 draws: 286 each, 16 the standard deviation, five of them allowed."""
    labels = torch.tensor([1, 0, 0, 1, 0, 0, 0, 1, 0, 0])
    drawn = torch.zeros(10)
    for seed in range(2000):
        drawn[draw(labels, 0.1, seed)] += 1
    expected = torch.where(labels == 0, 2000 / 7, 2000 / 3)
    spread = (2000 * torch.where(labels == 0, 6 / 49, 2 / 9)).sqrt()
    assert ((drawn - expected).abs() < 5 * spread).all(), drawn


def test_held_back_from_each_class_alike() -> None:
    kept = hold_back(LABELS, 0.2, seed=0)
    assert counts(LABELS[~kept]) == [20, 1, 0, 52]
    assert torch.equal(kept, hold_back(LABELS, 0.2, seed=0)) and not torch.equal(kept, hold_back(LABELS, 0.2, seed=1))
    assert counts(LABELS[~hold_back(LABELS, 0.001, seed=0)]) == [1, 1, 0, 1]


def index_of(*files: str) -> Index:
    names = sorted(files)
    classes = sorted({name.split("/")[0] for name in names})
    labels = torch.tensor([classes.index(name.split("/")[0]) for name in names])
    return Index(Path("root"), tuple(names), labels, tuple(classes))


IMAGENET = index_of("n01/n01_2.JPEG", "n01/n01_10.JPEG", "n02/n02_1.JPEG", "n02/odd é name.JPEG")
NUMBERED = index_of("cat/0.jpg", "cat/1.jpg", "dog/0.jpg")


def test_lists_as_simclr_has_them(tmp_path: Path) -> None:
    """Bare names, in any order, with the line ends of any system; names within the data set do as well."""
    path = tmp_path / "1percent.txt"
    path.write_bytes(b"n02_1.JPEG\r\nn01_2.JPEG\r\n\r\n")
    assert [IMAGENET.files[row] for row in named_by(path, IMAGENET)] == ["n01/n01_2.JPEG", "n02/n02_1.JPEG"]
    path.write_text("n02/n02_1.JPEG\nn01_10.JPEG")
    assert [IMAGENET.files[row] for row in named_by(path, IMAGENET)] == ["n01/n01_10.JPEG", "n02/n02_1.JPEG"]
    path.write_text("dog/0.jpg\n1.jpg\n")
    assert named_by(path, NUMBERED) == [1, 2]


@pytest.mark.parametrize(("index", "first"), [(IMAGENET, "n01_10.JPEG"), (NUMBERED, "cat/0.jpg")])
def test_written_lists_are_read_back(index: Index, first: str, tmp_path: Path) -> None:
    path = tmp_path / "subset.txt"
    write_names(path, listed_names(index, index))
    assert path.read_text().splitlines()[0] == first
    assert named_by(path, index) == list(range(len(index)))


@pytest.mark.parametrize("rows", [[0], [1, 2], [2]])
def test_names_that_the_subset_alone_has_once_are_written_whole(rows: list[int], tmp_path: Path) -> None:
    """cat/0.jpg alone may not be written as 0.jpg: there is a dog/0.jpg, too."""
    path = tmp_path / "subset.txt"
    write_names(path, listed_names(NUMBERED.take(rows), NUMBERED))
    assert named_by(path, NUMBERED) == rows


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    index = index_of("a/b\udcff.jpg", "a/c\u2028d.jpg")
    write_names(tmp_path / "subset.txt", listed_names(index, index))
    assert b"b\xff.jpg\n" in (tmp_path / "subset.txt").read_bytes()
    assert named_by(tmp_path / "subset.txt", index) == [0, 1]
    broken = index_of("a/a\nb.jpg")
    with pytest.raises(UserError, match=r"a\\nb.jpg.*rename"):
        listed_names(broken, broken)


@pytest.mark.parametrize(
    ("index", "content", "names"),
    [
        (IMAGENET, "n01_2.JPEG\nn03_9.JPEG\nn03_8.JPEG\n", ("2 of its 3 names", "n03_8.JPEG, n03_9.JPEG")),
        (IMAGENET, "n01_2.jpeg\n", ("n01_2.jpeg", "not among")),
        (NUMBERED, "0.jpg\n", ("0.jpg is the name of 2 images", "cat/0.jpg")),
        (NUMBERED, "1.jpg\ncat/1.jpg\ndog/0.jpg\n", ("more than once", "1.jpg, cat/1.jpg")),
        (NUMBERED, "\n \n", ("names no images",)),
        (NUMBERED, None, ("No such file",)),
    ],
)
def test_lists_that_cannot_be(index: Index, content: str | None, names: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError) as error:
        named_by(path, index)
    for name in (f"--list {path}", *names):
        assert name in str(error.value)


def test_classes_that_are_short() -> None:
    check_classes(NUMBERED, "the subset", 1)
    with pytest.raises(UserError, match=r"the subset: expected 2 or more .*: dog \(1\)"):
        check_classes(NUMBERED, "the subset", 2)
    with pytest.raises(UserError, match=r"1 or more .*: dog \(0\)"):
        check_classes(NUMBERED.take([0, 1]), "the subset", 1)
