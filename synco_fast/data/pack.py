"""Packing a data set into WebDataset shards: encoded images as they are, one after another, in few large files.

A shard gets its final name when it is complete and on disk, so a run that was killed goes on after the last complete
one and ends with the same bytes. The index is made by reading the shards, not from memory of having written them.
"""

import json
import os
import re
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import BinaryIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from synco_fast.data.index import scan, splits
from synco_fast.data.listing import check_listable, write_list
from synco_fast.data.reader import BadFile, read_header
from synco_fast.data.samples import IMAGE_SUFFIXES, Index, Sample, read_bytes
from synco_fast.data.shards import INDEX_NAME, scan_shards
from synco_fast.data.tar import scan_tar
from synco_fast.errors import UserError
from synco_fast.files import write_atomically, write_text_atomically

STATE_NAME = "pack.json"
_THREADS = 8
_READ_AHEAD = 64
_BLOCK = 512
_END = bytes(2 * _BLOCK)


def pack(source: Path, output: Path, shard_bytes: int) -> list[tuple[Path, Index]]:
    """Pack every split of a data set: into `output/<split>`, or into `output` itself if the source has no splits.

    Args:
        source: anything that `scan` takes.
        output: folder to make, or one that holds a pack of the same source, begun or complete.
        shard_bytes: size a shard does not exceed, unless it holds a single image.

    Returns:
        Each folder of shards, and what is in it.

    Raises:
        UserError: the source cannot be read, or `output` holds something else.
    """
    names = splits(source) if source.is_dir() else []
    parts = [(output / name, scan(source, name)) for name in names] or [(output, scan(source))]
    for folder, index in parts:
        check_listable(index, folder / INDEX_NAME)
        _check_folder(folder, _state(index, shard_bytes))
    for folder, index in parts:
        folder.mkdir(parents=True, exist_ok=True)
        write_text_atomically(folder / STATE_NAME, _state(index, shard_bytes))
    return [(folder, _pack_split(index, folder, shard_bytes)) for folder, index in parts]


def _state(index: Index, shard_bytes: int) -> str:
    return json.dumps({"digest": index.digest, "images": len(index), "shard_bytes": shard_bytes}) + "\n"


def _check_folder(folder: Path, state: str) -> None:
    file = folder / STATE_NAME
    if not folder.exists():
        return
    if file.exists():
        before = file.read_text(encoding="utf-8", errors="replace")
        if before != state:
            raise UserError(
                f"{folder} holds another pack: {STATE_NAME} there says {before.strip()[:300]}, this one is "
                f"{state.strip()}; give a new folder, or the same source and size of shards to go on"
            )
        return
    found = sorted(path.name for path in folder.iterdir() if path.name != f".{STATE_NAME}.tmp")
    if found:
        raise UserError(f"{folder} holds {found[0]}, which no pack has put there; give a new or an empty folder")


def _pack_split(index: Index, folder: Path, shard_bytes: int) -> Index:
    keys = _keys(index)
    shards, done = _complete_shards(folder, keys)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        ThreadPoolExecutor(_THREADS) as pool,
        Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar,
    ):
        task = bar.add_task(f"packing {folder}", total=len(index), completed=done)
        entries = _Ahead(_entries(pool, index, keys, done))
        while entries.next is not None:
            shards.append(_shard_name(len(shards)))
            write_atomically(
                folder / shards[-1], partial(_write_shard, entries, shard_bytes, partial(bar.advance, task))
            )
            if bar.disable:
                print(f"wrote {folder / shards[-1]}", file=sys.stderr, flush=True)
    written = scan_shards(folder, shards)
    _check_keys(folder, written.files, keys)
    packed = Index(folder, written.files, index.labels, index.classes, written.shards, written.extents)
    write_list(packed, folder / INDEX_NAME)
    return packed


def _shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def _complete_shards(folder: Path, keys: list[str]) -> tuple[list[str], int]:
    """Shards that an earlier run finished, and how many images are in them."""
    shards: list[str] = []
    done = 0
    while done < len(keys) and (folder / _shard_name(len(shards))).exists():
        names = [record.name for record in scan_tar(folder / _shard_name(len(shards)))]
        _check_keys(folder / _shard_name(len(shards)), names, keys[done : done + len(names)])
        shards.append(_shard_name(len(shards)))
        done += len(names)
    return shards, done


def _check_keys(where: Path, names: Sequence[str], keys: list[str]) -> None:
    if [name.rpartition(".")[0] for name in names] != keys:
        raise UserError(f"{where} holds other images than this pack puts there; remove {where.name} and pack again")


def _keys(index: Index) -> list[str]:
    """What each image's members are called, without extension: as in the index where that is unique in the data set
    and has no dot, which would end the key, and no folder but its class's, which would be taken for a class.
    """
    keys: dict[str, None] = {}
    for i, name in enumerate(index.files):
        folder = "" if index.labels is None else index.classes[int(index.labels[i])] + "/"
        stem, suffix = os.path.splitext(name.removeprefix(folder))
        stem += "" if suffix.lower() in IMAGE_SUFFIXES else suffix
        key = folder + re.sub("[./]", "_", stem)
        while key in keys:
            key += f"-{i}"
        keys[key] = None
    return list(keys)


class _Ahead:
    """An iterator whose next value can be looked at; None at the end."""

    def __init__(self, values: Iterator[bytes]) -> None:
        self._values = values
        self.next = next(values, None)

    def take(self) -> None:
        self.next = next(self._values, None)


def _write_shard(entries: _Ahead, limit: int, advance: Callable[[], None], file: BinaryIO) -> None:
    size = len(_END)
    while entries.next is not None and (size == len(_END) or size + len(entries.next) <= limit):
        size += file.write(entries.next)
        entries.take()
        advance()
    file.write(_END)


def _entries(pool: ThreadPoolExecutor, index: Index, keys: list[str], first: int) -> Iterator[bytes]:
    """The members of each image from the first on, as bytes of a tar file; read ahead, as reading waits for disks."""
    starts = range(first, len(index), _READ_AHEAD)
    ready: Iterator[bytes] = iter(())
    for start in starts:
        following = pool.map(partial(_entry, index, keys), range(start, min(start + _READ_AHEAD, len(index))))
        yield from ready
        ready = following
    yield from ready


def _entry(index: Index, keys: list[str], i: int) -> bytes:
    sample = index.sample(i)
    try:
        data = read_bytes(sample)
    except OSError as error:
        raise UserError(f"image file {sample} cannot be read: {error.strerror}") from error
    suffix = os.path.splitext(sample.name)[1]
    if suffix.lower() not in IMAGE_SUFFIXES:
        suffix = _suffix(sample)
    image = _member(keys[i] + suffix, data)
    return image if index.labels is None else image + _member(keys[i] + ".cls", b"%d" % int(index.labels[i]))


def _suffix(sample: Sample) -> str:
    """Of a record, which has no file name: what its bytes are, or .jpg if they are no image."""
    try:
        return f".{read_header(sample).format.lower()}"
    except BadFile:
        return ".jpg"


def _member(name: str, data: bytes) -> bytes:
    """Header and content, with nothing in it that depends on who packs, when or where."""
    header = tarfile.TarInfo(name)
    header.size = len(data)
    return header.tobuf(tarfile.PAX_FORMAT, "utf-8") + data + bytes(-len(data) % _BLOCK)
