"""Labelled subsets: drawn with a seed, held back from, and read from and written to lists of names."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from synco_fast.data.index import Index
from synco_fast.data.samples import examples
from synco_fast.errors import UserError
from synco_fast.files import write_atomically


def draw(labels: Tensor, fraction: float, seed: int) -> list[int]:
    """A share of each class, rounded, of one image at least: their numbers, ascending.

    Args:
        labels: (n,) int64 classes. fraction: in (0, 1]. seed: of which.
    """
    taken = _taken(labels, seed, lambda count: max(1, round(fraction * count)))
    return taken.nonzero().flatten().tolist()


def hold_back(labels: Tensor, share: float, seed: int) -> Tensor:
    """Which rows are kept when a share of each class is held back: (n,) bool.

    Held back is the rounded share, of one image at least, but never the only image of a class.
    """
    return ~_taken(labels, seed, lambda count: min(count - 1, max(1, round(share * count))))


def named_by(path: Path, index: Index) -> list[int]:
    """The images that a list names, a line each: numbers in the index, ascending.

    A line is an image's name within the data set, or that name's last part, as in the lists of SimCLR.

    Raises:
        UserError: it cannot be read, names nothing, or a name is not there, not the only one, or given twice.
    """
    try:
        lines = path.read_bytes().decode("utf-8", "surrogateescape").replace("\r\n", "\n").split("\n")
    except OSError as error:
        raise UserError(f"--list {path}: cannot read it: {error.strerror}") from error
    names = [line for line in lines if line.strip()]
    if not names:
        raise UserError(f"--list {path}: names no images; expected one name a line")
    rows = {name: row for row, name in enumerate(index.files)}
    last = [PurePosixPath(name).name for name in index.files]
    counts, by_last = Counter(last), {name: row for row, name in enumerate(last)}
    absent = [name for name in names if name not in rows and name not in by_last]
    if absent:
        raise UserError(
            f"--list {path}: {len(absent)} of its {len(names)} names are not among the {len(index)} images of "
            f"{index.root}: {examples(absent)}"
        )
    for name in names:
        if name not in rows and counts[name] > 1:
            also = next(file for file, short in zip(index.files, last, strict=True) if short == name)
            raise UserError(
                f"--list {path}: {name} is the name of {counts[name]} images in {index.root}; write it as {also}"
            )
    found = [rows[name] if name in rows else by_last[name] for name in names]
    repeated = Counter(found)
    twice = {name for name, row in zip(names, found, strict=True) if repeated[row] > 1}
    if twice:
        raise UserError(f"--list {path}: names images more than once: {examples(list(twice))}")
    return sorted(found)


def listed_names(subset: Index, index: Index) -> list[str]:
    """Names of a subset's images by which `named_by` finds them in the index: last parts, where those tell them apart.

    Raises:
        UserError: a name cannot stand in a list.
    """
    broken = [name for name in subset.files if "\n" in name or "\r" in name]
    if broken:
        raise UserError(f"the name {broken[0]!r} in {index.root} cannot be written to a list of names; rename it")
    counts = Counter(PurePosixPath(name).name for name in index.files)
    last = [PurePosixPath(name).name for name in subset.files]
    # A last part may also be the whole name of another image.
    alone = all(counts[name] == 1 for name in last) and not set(last) & (set(index.files) - set(subset.files))
    return last if alone else list(subset.files)


def write_names(path: Path, names: Sequence[str]) -> None:
    """Write a list as `named_by` reads it."""
    content = "".join(f"{name}\n" for name in names).encode("utf-8", "surrogateescape")
    write_atomically(path, lambda file: file.write(content))


def check_classes(index: Index, source: str, least: int) -> None:
    """Refuse a subset with fewer images of some class than are needed.

    Raises:
        UserError: naming what is short of them, `source`, and the classes.
    """
    assert index.labels is not None
    counts = index.labels.bincount(minlength=len(index.classes)).tolist()
    short = [f"{name} ({count})" for name, count in zip(index.classes, counts, strict=True) if count < least]
    if short:
        raise UserError(f"{source}: expected {least} or more images of each class, and there are: {examples(short)}")


def _taken(labels: Tensor, seed: int, number: Callable[[int], int]) -> Tensor:
    """Of each class as many rows as `number` says of its count, at random: (n,) bool."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    taken = torch.zeros(len(labels), dtype=torch.bool)
    by_class = order[torch.argsort(labels[order], stable=True)]
    for rows in by_class.split(labels.bincount().tolist()):
        taken[rows[: number(len(rows)) if len(rows) else 0]] = True
    return taken
