"""What a data set is made of: where each encoded image lies, in a file of its own or in a shard, and its bytes."""

import hashlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from synco_fast.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
LAYOUTS = (
    "expected <split>/<class>/* or <class>/* with images in class folders, a flat folder of images, "
    "a folder of shards (*.tar, *.tfrecord), or a text file listing one image per line"
)
# Opening is a round trip to a server where the files are on a network, reading from what is open often is not. Half of
# the 1024 that a process may usually hold open.
_OPEN_SHARDS = 512


@dataclass(frozen=True)
class Shard:
    """A file that holds many images, as it was when it was indexed: bytes, and time of change in nanoseconds."""

    path: Path
    size: int
    modified: int

    @staticmethod
    def at(path: Path) -> "Shard":
        """The shard as it is now; OSError where there is none."""
        found = path.stat()
        return Shard(path, found.st_size, found.st_mtime_ns)


@dataclass(frozen=True)
class Sample:
    """One encoded image: the whole file `path`, or `length` bytes at `offset` of the shard.

    `name` is relative to the data set's root or to the shard; str() is what messages call the image.
    """

    path: Path
    name: str
    shard: Shard | None = None
    offset: int = 0
    length: int = 0

    def __str__(self) -> str:
        return str(self.path) if self.shard is None else f"{self.path}: {self.name}"


@dataclass(frozen=True, eq=False)
class Index:
    """The images of one split.

    Attributes:
        root: folder the files are relative to.
        files: the images' names. Images with files of their own: paths relative to root, forward slashes; `scan` and
            `held_out` return them sorted. Images in shards: names of members, in the order of the shards' names and of
            the offsets in them; `<shard>/<member>` for all if members of different shards have the same name.
        labels: (n,) int64 class numbers, or None when unlabelled.
        classes: class names by number; empty when unlabelled.
        shards: the files that hold the images, by path; empty when each image has its own.
        extents: (n, 3) int64 number of the shard, offset and length in bytes; None when there are no shards.
        digest: SHA-256 over files and labels. The same digest means the same samples in the same order, wherever their
            bytes are: a packed data set has the digest of the folder it was packed from, unless names had to change.
    """

    root: Path
    files: tuple[str, ...]
    labels: Tensor | None
    classes: tuple[str, ...]
    shards: tuple[Shard, ...] = ()
    extents: Tensor | None = None
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        content = hashlib.sha256("\n".join(self.files).encode("utf-8", "surrogateescape"))
        if self.labels is not None:
            content.update(b"\0" + self.labels.numpy().astype("<i8").tobytes())
        object.__setattr__(self, "digest", content.hexdigest())

    def __len__(self) -> int:
        return len(self.files)

    def path(self, i: int) -> Path:
        """Full path of the file that holds sample i."""
        return self.sample(i).path

    def sample(self, i: int) -> Sample:
        """Where sample i is."""
        if self.extents is None:
            return Sample(self.root / self.files[i], self.files[i])
        number, offset, length = self.extents[i].tolist()
        shard = self.shards[number]
        return Sample(shard.path, self.files[i].removeprefix(shard.path.name + "/"), shard, offset, length)

    def take(self, indices: Sequence[int]) -> "Index":
        """The given samples in the given order."""
        rows = torch.as_tensor(indices, dtype=torch.int64)
        labels, extents = (None if per_row is None else per_row[rows] for per_row in (self.labels, self.extents))
        return Index(self.root, tuple(self.files[i] for i in indices), labels, self.classes, self.shards, extents)


def examples(names: Sequence[str]) -> str:
    """A few of the names, for a message."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(sorted(names)[:3]) + more


def read_bytes(sample: Sample) -> bytes:
    """The encoded image. Safe from several threads.

    Raises:
        OSError: the file cannot be read.
        UserError: the shard is not the one that was indexed.
    """
    if sample.shard is None:
        return sample.path.read_bytes()
    return _read_range(sample.shard, sample.offset, sample.length)


def open_image(sample: Sample) -> BinaryIO:
    """The encoded image as a file, to read part of it; reading raises as `read_bytes`."""
    return sample.path.open("rb") if sample.shard is None else io.BufferedReader(_Window(sample))


def close_shards() -> None:
    """Close what reading keeps open; reading goes on to work, by opening again."""
    _descriptor.cache_clear()


class _Descriptor:
    """An open file, closed with the last reference: the cache may drop it while another thread reads."""

    def __init__(self, path: Path) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


@lru_cache(maxsize=_OPEN_SHARDS)
def _descriptor(shard: Shard) -> _Descriptor:
    return _Descriptor(shard.path)


def _read_range(shard: Shard, offset: int, length: int) -> bytes:
    opened = _descriptor(shard)
    found = os.fstat(opened.number)
    if (found.st_size, found.st_mtime_ns) != (shard.size, shard.modified):
        raise UserError(
            f"shard {shard.path} changed after it was indexed: it has {found.st_size} bytes, and had {shard.size}"
            f"{' but was written anew' if found.st_size == shard.size else ''}; start again to index it as it is now"
        )
    data = os.pread(opened.number, length, offset)
    if len(data) != length:
        raise UserError(f"shard {shard.path} ends before byte {offset + length}: it was cut while being read")
    return data


class _Window(io.RawIOBase):
    """Read-only file over a sample's bytes in its shard."""

    def __init__(self, sample: Sample) -> None:
        super().__init__()
        self._sample = sample
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._sample.length}[whence]
        if base + offset < 0:
            raise OSError("negative position")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: "memoryview | bytearray") -> int:  # type: ignore[override]
        sample = self._sample
        count = max(0, min(len(buffer), sample.length - self._position))
        if count:
            assert sample.shard is not None
            buffer[:count] = _read_range(sample.shard, sample.offset + self._position, count)
            self._position += count
        return count
