"""Data sets of shards, WebDataset (tar) or TFRecord: which files they are, and all their images as one index."""

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from synco_fast.data.samples import Index, Shard
from synco_fast.data.tar import Record, scan_tar
from synco_fast.data.tfrecord import scan_tfrecord
from synco_fast.errors import UserError

INDEX_NAME = "synco-index.tsv"
"""A list of a folder's shards and the images in them, read instead of the shards."""

SPLIT_WORDS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_TFRECORD = re.compile(r"\.tfrecords?$|-[0-9]{5}-of-[0-9]{5}$")
_COMPRESSED = re.compile(r"(\.tar|\.tfrecords?|-[0-9]{5}-of-[0-9]{5})\.(gz|bz2|xz|zst|lz4)$|\.(tgz|tbz2?|txz)$")
_THREADS = 8


def is_shard(name: str) -> bool:
    """Whether a file of this name is taken for a shard."""
    return _scanner(name) is not None


def is_compressed(name: str) -> bool:
    """Whether a file of this name would be a shard if it were decompressed."""
    return _COMPRESSED.search(name.lower()) is not None


def by_split(folder: Path, names: Sequence[str]) -> dict[str, list[str]]:
    """A folder's shards by the split their names speak of, as train-00000-of-01024; empty unless they speak of several.

    Raises:
        UserError: they speak of several, and some of none.
    """
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        words = re.split("[^a-z]+", name.lower())
        found.setdefault(next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), ""), []).append(name)
    nameless = found.pop("", [])
    if len(found) < 2:
        return {}
    if nameless:
        splits = ", ".join(names[0] for names in found.values())
        raise UserError(
            f"data folder {folder} holds shards of several splits ({splits}) and {nameless[0]}, whose name tells none; "
            "rename it, or move each split to a folder of its own: train/, val/"
        )
    return found


def scan_shards(folder: Path, names: Sequence[str]) -> Index:
    """The images of these shards of a folder.

    Labels are class numbers, from `.cls` members or the feature `image/class/label`, made dense: the class of the
    lowest number is 0, and classes are called by their numbers; if every image is in a folder and folders and numbers
    are one to one, they are called by the folders. Without numbers, images named `<class>/<file>` have folders as
    classes.

    Raises:
        UserError: a shard cannot be read, kinds are mixed, or only some images have a class.
    """
    names = sorted(names)
    if len({_scanner(name) for name in names}) > 1:
        raise UserError(
            f"data folder {folder} holds both tar files and TFRecord files ({names[0]}, ...); keep one kind"
        )
    with ThreadPoolExecutor(_THREADS) as pool:
        scanned = list(pool.map(_scan_shard, [folder / name for name in names]))
    records = [record for _, per_shard in scanned for record in per_shard]
    files = [record.name for record in records]
    if len(set(files)) < len(files) or _scanner(names[0]) is scan_tfrecord:  # which numbers its records
        files = [f"{shard.path.name}/{record.name}" for shard, per_shard in scanned for record in per_shard]
    extents = torch.tensor(
        [(number, one.offset, one.length) for number, (_, per_shard) in enumerate(scanned) for one in per_shard]
    )
    numbers, classes = _classes(folder, records)
    labels = None if numbers is None else torch.tensor(numbers, dtype=torch.int64)
    return Index(folder, tuple(files), labels, classes, tuple(shard for shard, _ in scanned), extents)


def _scanner(name: str) -> Callable[[Path], list[Record]] | None:
    if name.lower().endswith(".tar"):
        return scan_tar
    return scan_tfrecord if _TFRECORD.search(name.lower()) else None


def _scan_shard(path: Path) -> tuple[Shard, list[Record]]:
    scanner = _scanner(path.name)
    assert scanner is not None
    try:
        return Shard.at(path), scanner(path)
    except OSError as error:
        raise UserError(f"shard {path} cannot be read: {error.strerror or error}") from error


def _classes(folder: Path, records: list[Record]) -> tuple[list[int] | None, tuple[str, ...]]:
    """Labels 0 to C - 1, and the classes' names."""
    numbers = [record.label for record in records if record.label is not None]
    folders = [_class_folder(record.name) for record in records]
    if numbers:
        if len(numbers) < len(records):
            missing = next(record.name for record in records if record.label is None)
            raise UserError(
                f"data folder {folder}: {len(numbers)} of {len(records)} images in its shards have a class number, "
                f"{missing} has none; label all or none"
            )
        dense = {number: label for label, number in enumerate(sorted(set(numbers)))}
        pairs = set(zip(numbers, folders, strict=True))
        one_to_one = "" not in folders and len(pairs) == len(dense) == len(set(folders))
        named = {number: name if one_to_one else str(number) for number, name in pairs}
        return [dense[number] for number in numbers], tuple(named[number] for number in dense)
    if "" in folders:
        inside = next((name for name in folders if name), None)
        if inside is not None:
            raise UserError(
                f"data folder {folder}: some images in its shards are named <class>/<file>, as in {inside}/, and some "
                "are not, so it is unclear whether the folders are classes"
            )
        return None, ()
    labels = {name: label for label, name in enumerate(sorted(set(folders)))}
    return [labels[name] for name in folders], tuple(labels)


def _class_folder(name: str) -> str:
    """The folder of a name with exactly one; else nothing."""
    folder, _, _ = name.rpartition("/")
    return "" if "/" in folder else folder
