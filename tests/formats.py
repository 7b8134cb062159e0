"""Writers of shards that share no code with the package: Python's tarfile, and TFRecord by its definition."""

import io
import itertools
import struct
import tarfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from synco_fast.data.index import scan
from synco_fast.data.listing import write_list
from synco_fast.data.loader import Batch, TrainLoader
from synco_fast.data.pipeline import dali
from synco_fast.data.recipes import RECIPES
from synco_fast.data.samples import Index

Member = tuple[str, bytes]
Features = dict[str, bytes | list[int] | list[float]]


def write_tar(file: Path | io.BytesIO, members: Iterable[Member], format: int = tarfile.PAX_FORMAT) -> None:
    path, buffer = (file, None) if isinstance(file, Path) else (None, file)
    with tarfile.open(path, "w", fileobj=buffer, format=format) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def crc32c(data: bytes) -> int:
    """Bit by bit: the remainder of a division by the Castagnoli polynomial, reflected."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
    return crc ^ 0xFFFFFFFF


def framed(message: bytes) -> bytes:
    """A record of a TFRecord file."""

    def checksum(data: bytes) -> bytes:
        crc = crc32c(data)
        return struct.pack("<I", ((crc >> 15 | crc << 17 & 0xFFFFFFFF) + 0xA282EAD8) % 2**32)

    length = struct.pack("<Q", len(message))
    return length + checksum(length) + message + checksum(message)


def varint(value: int) -> bytes:
    value %= 2**64
    groups = []
    while True:
        value, group = value >> 7, value & 127
        groups.append(group | 128 * (value > 0))
        if not value:
            return bytes(groups)


def delimited(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def example(features: Features, packed: bool = True) -> bytes:
    """A tf.train.Example; whole numbers packed, as TensorFlow writes them, or one by one."""
    entries = b""
    for name, value in features.items():
        if isinstance(value, bytes):
            feature = delimited(1, delimited(1, value))
        elif all(isinstance(one, int) for one in value):
            numbers = [varint(int(one)) for one in value]
            inside = delimited(1, b"".join(numbers)) if packed else b"".join(varint(1 << 3) + one for one in numbers)
            feature = delimited(3, inside)
        else:
            feature = delimited(2, delimited(1, struct.pack(f"<{len(value)}f", *value)))
        entries += delimited(1, delimited(1, name.encode()) + delimited(2, feature))
    return delimited(1, entries)


def write_tfrecord(path: Path, records: Iterable[Features], packed: bool = True) -> None:
    path.write_bytes(b"".join(framed(example(features, packed)) for features in records))


def parts(index: Index, count: int) -> list[range]:
    """Rows of an index in so many parts of unequal size."""
    bounds = [0, *(len(index) * (2 * i + 1) // (2 * count) for i in range(1, count)), len(index)]
    return [range(start, end) for start, end in itertools.pairwise(bounds)]


def as_tar(index: Index, folder: Path, count: int, labels: bool) -> None:
    """The images of a folder in tar shards, with or without `.cls` members."""
    folder.mkdir(parents=True)
    for number, rows in enumerate(parts(index, count)):
        members: list[Member] = []
        for i in rows:
            members.append((index.files[i], index.path(i).read_bytes()))
            if labels and index.labels is not None:
                members.append((index.files[i].rpartition(".")[0] + ".cls", str(int(index.labels[i])).encode()))
        write_tar(folder / f"part-{number}.tar", members)


def as_tfrecord(index: Index, folder: Path, names: Sequence[str], first_label: int = 1) -> None:
    """The images of a folder in TFRecord files of these names, with ImageNet's features."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(names, parts(index, len(names)), strict=True):
        records: list[Features] = []
        for i in rows:
            assert index.labels is not None
            label = int(index.labels[i]) + first_label
            records.append(
                {
                    "image/class/label": [label],
                    "image/object/bbox/xmin": [0.25, 0.5],
                    "image/encoded": index.path(i).read_bytes(),
                    "image/filename": index.files[i].encode(),
                    "image/height": [300] * (i % 3),
                }
            )
        write_tfrecord(folder / name, records, packed=bool(i % 2))


IMAGENET = [f"train-{i:05}-of-00003" for i in range(3)]


def tar_with_numbers(index: Index, folder: Path) -> Path:
    as_tar(index, folder, 3, labels=True)
    return folder


def tar_with_folders(index: Index, folder: Path) -> Path:
    as_tar(index, folder, 4, labels=False)
    return folder


def one_tar(index: Index, folder: Path) -> Path:
    as_tar(index, folder, 1, labels=True)
    return folder / "part-0.tar"


def tfrecord(index: Index, folder: Path) -> Path:
    as_tfrecord(index, folder, ["a.tfrecord", "b.tfrecord"])
    return folder


def imagenet(index: Index, folder: Path) -> Path:
    as_tfrecord(index, folder, IMAGENET)
    return folder


def list_of_files(index: Index, folder: Path) -> Path:
    folder.mkdir()
    write_list(index, folder / "list.tsv")
    return folder / "list.tsv"


def list_of_shards(index: Index, folder: Path) -> Path:
    shards = scan(tar_with_numbers(index, folder / "shards"))
    write_list(shards, folder / "list.tsv")
    return folder / "list.tsv"


FORMATS: dict[str, Callable[[Index, Path], Path]] = {
    make.__name__: make
    for make in (tar_with_numbers, tar_with_folders, one_tar, tfrecord, imagenet, list_of_files, list_of_shards)
}


def batches(index: Index, start: int, count: int) -> list[Batch]:
    loader = TrainLoader(
        index,
        batch_size=8,
        image_size=32,
        recipe=RECIPES["moco_v2"],
        seed=3,
        device=torch.device("cpu"),
        threads=2,
        prefetch=2,
        step=start,
    )
    found = [next(loader) for _ in range(count)]
    loader.close()
    return found


def check_same(ours: list[Batch], theirs: list[Batch]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert (a.epoch, a.step) == (b.epoch, b.step)
        assert all(map(torch.equal, a.views, b.views))


def dali_reads(count: int, read: Callable[[Any], tuple[Any, ...]]) -> list[list[bytes]]:
    """The outputs of DALI's own reader for each of so many samples, on the CPU."""
    fn, _, pipeline_def = dali()
    pipeline = pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)(lambda: read(fn))()
    pipeline.build()
    return [[np.asarray(output[0]).tobytes() for output in pipeline.run()] for _ in range(count)]
