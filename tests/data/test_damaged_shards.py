"""Shards that are damaged, ambiguous or no shards at all: one message, or an index that is sound."""

import gzip
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from synco_fast.data.index import scan
from synco_fast.errors import UserError
from tests.command import call, check_error
from tests.formats import delimited, example, framed, one_tar, tfrecord, write_tar


def gzipped(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)


def tar_bytes(*members: tuple[str, bytes], damage: Callable[[bytes], bytes] = lambda data: data) -> dict[str, bytes]:
    buffer = io.BytesIO()
    write_tar(buffer, members)
    return {"x.tar": damage(buffer.getvalue())}


def linked(kind: bytes) -> dict[str, bytes]:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo("a.jpg")
        member.type, member.linkname = kind, "b.jpg"
        archive.addfile(member)
    return {"x.tar": buffer.getvalue()}


def records(*messages: bytes, damage: Callable[[bytes], bytes] = lambda data: data) -> dict[str, bytes]:
    return {"x.tfrecord": damage(b"".join(framed(message) for message in messages))}


def flipped(at: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


IMAGE = ("a.jpg", b"x" * 700)
GOOD = example({"image/encoded": b"x" * 700})
NOISE = np.random.default_rng(0).integers(0, 256, 30000, dtype=np.uint8).tobytes()
HOSTILE: dict[str, tuple[dict[str, bytes], tuple[str, ...]]] = {
    "tar cut in an image": (tar_bytes(IMAGE, damage=lambda data: data[:1000]), ("cut short",)),
    "tar cut in a header": (tar_bytes(IMAGE, ("b.jpg", b"y"), damage=lambda data: data[:1800]), ("cut short", "1536")),
    "tar cut between members": (tar_bytes(IMAGE, damage=lambda data: data[:1536]), ("cut short", "1536")),
    "tar with a damaged header": (tar_bytes(IMAGE, ("b.jpg", b"y"), damage=flipped(1540)), ("damaged", "1536")),
    "tar without images": (tar_bytes(("a.txt", b"x"), ("b.cls", b"1")), ("no images", ".jpeg")),
    "tar of tars": (tar_bytes(("n01440764.tar", b"x")), ("no images",)),
    "empty tar": (tar_bytes(), ("no images",)),
    "empty file": ({"x.tar": b""}, ("empty",)),
    "noise called tar": ({"x.tar": NOISE}, ("not a tar file",)),
    "text called tar": ({"x.tar": b"text"}, ("not a tar file",)),
    "gzip called tar": (tar_bytes(IMAGE, damage=gzipped), ("compressed (gzip)", "decompress")),
    "one bad tar of two": ({**tar_bytes(IMAGE), "y.tar": NOISE}, ("y.tar", "not a tar file")),
    "tar.gz": ({"x.tar.gz": gzipped(NOISE)}, ("x.tar.gz", "decompress")),
    "tar.gz beside tar": ({**tar_bytes(IMAGE), "y.tar.gz": NOISE}, ("y.tar.gz", "decompress")),
    "same member twice": (tar_bytes(IMAGE, IMAGE), ("a.jpg", "more than once")),
    "two images of one key": (tar_bytes(IMAGE, ("a.png", b"y")), ("a.jpg and", "a.png", "one sample")),
    "symbolic link": (linked(tarfile.SYMTYPE), ("a.jpg is a link", "tar -h")),
    "hard link": (linked(tarfile.LNKTYPE), ("a.jpg is a link",)),
    "member that leads out": (tar_bytes(("../a.jpg", b"x")), ("../a.jpg leads out",)),
    "number on some": (tar_bytes(IMAGE, ("a.cls", b"1"), ("b.jpg", b"y")), ("1 of 2", "b.jpg", "label all or none")),
    "folder on some": (tar_bytes(IMAGE, ("c/b.jpg", b"y")), ("c/", "unclear")),
    "label that is no number": (tar_bytes(IMAGE, ("a.cls", b"cat")), ("a.cls", "b'cat'", "class number")),
    "huge label": (tar_bytes(IMAGE, ("a.cls", b"9" * 40)), ("a.cls", "class number")),
    "wrong checksum": (records(GOOD, damage=flipped(9)), ("record 0 at byte 0", "checksum")),
    "wrong length": (records(GOOD, GOOD, damage=flipped(len(framed(GOOD)))), ("record 1", "checksum")),
    "noise called tfrecord": ({"x.tfrecord": NOISE}, ("checksum", "not TFRecord")),
    "gzip called tfrecord": (records(GOOD, damage=gzipped), ("compressed (gzip)",)),
    "empty tfrecord": ({"x.tfrecord": b""}, ("is empty",)),
    "tfrecord cut in a record": (records(GOOD, GOOD, damage=lambda data: data[:-1]), ("record 1", "cut short")),
    "tfrecord cut in a length": (records(GOOD, damage=lambda data: data + data[:7]), ("record 1", "cut short")),
    "another message": (records(b"\xff" * 40), ("record 0", "not a tf.train.Example")),
    "field beyond its message": (records(delimited(1, b"abc")[:-1]), ("longer than its message",)),
    "no image": (records(example({"x": [1], "label": [2]})), ("no feature image/encoded", "label, x")),
    "image of numbers": (records(example({"image/encoded": [1]})), ("0 byte strings",)),
    "label of fractions": (records(example({"image/encoded": b"x", "image/class/label": [0.5]})), ("not one int64",)),
    "two labels": (records(example({"image/encoded": b"x", "image/class/label": [1, 2]})), ("not one int64",)),
    "number on some records": (records(GOOD, example({"image/encoded": b"y", "image/class/label": [1]})), ("1 of 2",)),
    "both kinds": ({**tar_bytes(IMAGE), **records(GOOD)}, ("both tar files and TFRecord",)),
    "shards beside images": ({**tar_bytes(IMAGE), "a.jpg": b"x"}, ("images (a.jpg", "shards (x.tar", "keep one")),
    "splits and another": (
        {"train-0.tar": b"", "val-0.tar": b"", "x.tar": b""},
        ("train-0.tar", "val-0.tar", "x.tar", "tells none"),
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile(kind: str, tmp_path: Path) -> None:
    files, names = HOSTILE[kind]
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    done = call("data", "stats", tmp_path)
    check_error(done.code, done.err, (str(tmp_path), *names))
    assert (done.code, done.out) == (1, "")


def test_random_damage_is_an_error_or_a_sound_index(jpeg_root: Path, tmp_path: Path) -> None:
    """Whatever the bytes, offsets stay within the file, and nothing but a UserError comes out."""
    rng = np.random.default_rng(5)
    for make, name in ((one_tar, "part-0.tar"), (tfrecord, "a.tfrecord")):
        make(scan(jpeg_root).take(range(4)), tmp_path / name)
        good = np.frombuffer((tmp_path / name / name).read_bytes(), np.uint8)
        target = tmp_path / f"damaged-{name}"
        headers = [*range(min(600, len(good))), *range(len(good) - 600, len(good))]
        for _ in range(150):
            bad = good.copy()
            bad[rng.choice(headers, 3)] = rng.integers(0, 256, 3)
            target.write_bytes(bad[: rng.integers(1, len(bad) + 1)].tobytes())
            try:
                index = scan(target)
            except UserError:
                continue
            assert index.extents is not None
            assert (index.extents[:, 1] + index.extents[:, 2] <= target.stat().st_size).all()
            assert (index.extents[:, 1:] >= 0).all()
