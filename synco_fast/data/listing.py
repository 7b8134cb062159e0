"""Lists of images: a data set as a text file, to write and to read.

UTF-8, a line per image, fields parted by tabs, paths relative to the list's own folder:

    path
    path <tab> label
    shard <tab> label <tab> offset <tab> length <tab> name

The third form, for images in shards, has the bytes of the image in its shard and the name it goes by; its label may be
empty. A list has one form throughout, and labels on every line or on none. Lines beginning with `# ` are comments, but

    # root <tab> folder                where paths are relative to, instead of the list's folder
    # class <tab> label <tab> name     name of a class; all of 0, 1, 2, ... or none
    # shard <tab> path <tab> bytes     size a shard must have, so that offsets cannot be those of another file

are heeded. The order of the lines does not matter: images are sorted by path, or by shard and offset.
"""

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from synco_fast.data.samples import IMAGE_SUFFIXES, LAYOUTS, Index, Shard, examples
from synco_fast.data.shards import is_shard
from synco_fast.errors import UserError
from synco_fast.files import write_text_atomically

_NUMBER_DIGITS = 18
_LABEL_DIGITS = 7


def check_listable(index: Index, path: Path) -> None:
    """Refuse what `write_list` would.

    Raises:
        UserError: a list at `path` would not be taken for one, or cannot hold a name; says which.
    """
    if path.suffix.lower() in IMAGE_SUFFIXES or is_shard(path.name):
        raise UserError(f"{path}: a list of images cannot be named like an image or a shard; name it .txt")
    for name in itertools.chain(index.files, index.classes, (shard.path.name for shard in index.shards)):
        broken = name != name.strip() or name.startswith("# ") or any(char in name for char in "\t\n\r")
        if broken or name.encode(errors="ignore").decode() != name:
            raise UserError(
                f"the name {name!r} in {index.root} cannot be written to a list of images: it has a tab or a line "
                "break, spaces at an end, '# ' at its start, or is not UTF-8; rename it"
            )


def write_list(index: Index, path: Path) -> None:
    """Write an index as a list that `scan` reads back: the same samples, labels, classes and digest.

    Raises:
        UserError: a name cannot be listed, or the file cannot be written.
    """
    check_listable(index, path)
    root, folder = index.root.resolve(), path.parent.resolve()
    lines = [] if root == folder else [f"# root\t{root.relative_to(folder) if root.is_relative_to(folder) else root}"]
    lines += [f"# class\t{label}\t{name}" for label, name in enumerate(index.classes)]
    shards = [shard.path.relative_to(index.root).as_posix() for shard in index.shards]
    lines += [f"# shard\t{name}\t{shard.size}" for name, shard in zip(shards, index.shards, strict=True)]
    labels = [""] * len(index) if index.labels is None else [str(label) for label in index.labels.tolist()]
    if index.extents is None:
        ends = ["\t" * bool(label) + label for label in labels]
        lines += [name + end for name, end in zip(index.files, ends, strict=True)]
    else:
        rows = zip(index.extents.tolist(), labels, index.files, strict=True)
        lines += [f"{shards[shard]}\t{label}\t{at}\t{length}\t{name}" for (shard, at, length), label, name in rows]
    write_text_atomically(path, "".join(f"{line}\n" for line in lines))


def read_list(listing: Path) -> Index:
    """The images that a list names.

    Raises:
        UserError: the list is malformed, or does not fit the files there are; names list and line.
    """
    try:
        content = listing.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"file list {listing} is not UTF-8 text; {LAYOUTS}") from error
    except OSError as error:
        raise UserError(f"file list {listing} cannot be read: {error.strerror}") from error
    parser = _Parser(listing)
    for number, line in enumerate(content.split("\n"), 1):
        parser.add(number, line.rstrip("\r"))
    if parser.in_shards and parser.in_files:
        raise UserError(f"file list {listing} names both images in files and images in shards; make it two lists")
    if not parser.in_shards and not parser.in_files:
        raise UserError(f"file list {listing} names no files; {LAYOUTS}")
    return _index_of_shards(parser) if parser.in_shards else _index_of_files(parser)


@dataclass
class _Parser:
    """What the lines of a list say so far."""

    listing: Path
    root: Path = field(init=False)
    classes: dict[int, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    in_files: list[tuple[str, int | None]] = field(default_factory=list)
    in_shards: list[tuple[str, int, int, str, int | None]] = field(default_factory=list)
    """(shard, offset, length, name, label)"""
    _paths: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.root = self.listing.parent

    def add(self, number: int, line: str) -> None:
        where = f"file list {self.listing} line {number}"
        fields = line.split("\t")
        if line.startswith("# "):
            self._heed(where, fields)
        elif len(fields) == 5:
            shard, label, offset, length, name = fields
            extent = _number(where, "offset", offset), _number(where, "length", length)
            self.in_shards.append((self._shard(where, shard), *extent, name, self._label(where, label)))
        elif len(fields) > 2:
            raise UserError(
                f"{where} has {len(fields)} fields; expected path, path <tab> label, or shard <tab> label <tab> offset "
                "<tab> length <tab> name"
            )
        elif line.strip():
            path = self._path(where, fields[0])
            if PurePosixPath(path).suffix.lower() not in IMAGE_SUFFIXES:
                raise UserError(f"{where}: {fields[0]} is not an image name; they end in {' '.join(IMAGE_SUFFIXES)}")
            self.in_files.append((path, self._label(where, fields[1]) if len(fields) == 2 else None))

    def labels(self, labels: Sequence[int | None]) -> tuple[Tensor | None, tuple[str, ...]]:
        """Labels and classes of the images in their final order."""
        numbers = [label for label in labels if label is not None]
        if not numbers:
            return None, ()
        if len(numbers) != len(labels):
            raise UserError(f"file list {self.listing} labels {len(numbers)} of {len(labels)} files; label all or none")
        if not self.classes:
            present = sorted(set(numbers))
            dense = {number: label for label, number in enumerate(present)}
            return torch.tensor([dense[number] for number in numbers]), self._folders() or tuple(map(str, present))
        count = max(*numbers, *self.classes) + 1
        missing = sorted(set(range(count)) - set(self.classes))
        if missing:
            raise UserError(
                f"file list {self.listing} names {len(self.classes)} classes with '# class' lines, but not class "
                f"{missing[0]}; name all or none"
            )
        return torch.tensor(numbers), tuple(self.classes[number] for number in range(count))

    def _folders(self) -> tuple[str, ...] | None:
        """Names of the folders by class number, where every class has a folder of its own."""
        pairs = {(label, path.rpartition("/")[0]) for path, label in self.in_files if label is not None}
        names = {label: folder.rpartition("/")[2] for label, folder in pairs}
        if not pairs or not len(pairs) == len(names) == len(set(names.values()) - {""}):
            return None
        return tuple(names[label] for label in sorted(names))

    def _heed(self, where: str, fields: list[str]) -> None:
        if fields[0] == "# root" and len(fields) == 2:
            self.root = self.listing.parent / fields[1]
        elif fields[0] == "# class" and len(fields) == 3:
            label = self._label(where, fields[1])
            if label is None or label in self.classes or "/" in fields[2] or fields[2] in ("", ".", ".."):
                raise UserError(f"{where}: expected one name without / for each class, found {fields[2]!r}")
            self.classes[label] = fields[2]
        elif fields[0] == "# shard" and len(fields) == 3:
            self.sizes[self._shard(where, fields[1])] = _number(where, "size", fields[2])

    def _shard(self, where: str, name: str) -> str:
        if name not in self._paths:
            self._paths[name] = self._path(where, name)
        return self._paths[name]

    def _path(self, where: str, name: str) -> str:
        path = PurePosixPath(os.path.normpath(name.strip()))
        if path.is_absolute() or path.parts[:1] == ("..",):
            raise UserError(f"{where}: {name} lies outside {self.root}; paths are relative to that folder")
        return str(path)

    def _label(self, where: str, text: str) -> int | None:
        text = text.strip()
        if not text:
            return None
        if not (text.isascii() and text.isdigit() and len(text) <= _LABEL_DIGITS):
            raise UserError(f"{where}: label {text!r} is not a class number (0, 1, 2, ...)")
        return int(text)


def _number(where: str, what: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= _NUMBER_DIGITS):
        raise UserError(f"{where}: {what} {text!r} is not a number of bytes")
    return int(text)


def _index_of_files(parser: _Parser) -> Index:
    pairs = sorted(parser.in_files, key=lambda pair: pair[0])
    files = tuple(file for file, _ in pairs)
    duplicates = [file for file, following in itertools.pairwise(files) if file == following]
    if duplicates:
        raise UserError(f"file list {parser.listing} names files more than once: {examples(duplicates)}")
    labels, classes = parser.labels([label for _, label in pairs])
    missing = [file for file in files if not (parser.root / file).is_file()]
    if missing:
        raise UserError(
            f"file list {parser.listing} names {len(missing)} files that do not exist: {examples(missing)}; "
            f"paths are relative to {parser.root}"
        )
    return Index(parser.root, files, labels, classes)


def _index_of_shards(parser: _Parser) -> Index:
    rows = sorted(parser.in_shards, key=lambda row: row[:3])
    names = sorted({row[0] for row in rows} | set(parser.sizes))
    shards = [_shard(parser, name) for name in names]
    numbers = {name: number for number, name in enumerate(names)}
    extents = torch.tensor([(numbers[shard], offset, length) for shard, offset, length, _, _ in rows])
    ends = extents[:, 1] + extents[:, 2]
    beyond = (ends > torch.tensor([shard.size for shard in shards])[extents[:, 0]]).nonzero().flatten().tolist()
    twice = [row for row, following in itertools.pairwise(rows) if row[:2] == following[:2] and row[2]]
    if beyond or twice:
        shard, offset, length, name, _ = twice[0] if twice else rows[beyond[0]]
        fault = (
            "is named twice" if twice else f"lies beyond the end of its shard of {shards[numbers[shard]].size} bytes"
        )
        raise UserError(f"file list {parser.listing}: {shard}: {name} at {offset}, {length} bytes, {fault}")
    labels, classes = parser.labels([row[4] for row in rows])
    return Index(parser.root, tuple(row[3] for row in rows), labels, classes, tuple(shards), extents)


def _shard(parser: _Parser, name: str) -> Shard:
    path = parser.root / name
    try:
        shard = Shard.at(path)
    except OSError as error:
        raise UserError(
            f"file list {parser.listing} names shard {path}, which cannot be read: {error.strerror}"
        ) from error
    expected = parser.sizes.get(name, shard.size)
    if shard.size != expected:
        raise UserError(
            f"shard {path} has {shard.size} bytes, but {expected} when file list {parser.listing} was written: bring "
            "that shard back, or remove the list to have the shards read anew"
        )
    return shard
