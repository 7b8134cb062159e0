"""WebDataset and TFRecord sets against the folder they were made from, and against DALI's own readers."""

import os
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from synco_fast.data import samples
from synco_fast.data.index import Index, held_out, scan
from synco_fast.data.listing import write_list
from synco_fast.data.samples import open_image, read_bytes
from synco_fast.data.stats import statistics
from synco_fast.errors import UserError
from tests.command import call
from tests.formats import (
    FORMATS,
    IMAGENET,
    as_tar,
    as_tfrecord,
    batches,
    check_same,
    dali_reads,
    example,
    framed,
    imagenet,
    one_tar,
    tar_with_numbers,
    tfrecord,
    write_tar,
)


@pytest.fixture(scope="module")
def folder(jpeg_root: Path) -> Index:
    return scan(jpeg_root)


@pytest.fixture(scope="module", params=FORMATS)
def other(request: pytest.FixtureRequest, folder: Index, tmp_path_factory: pytest.TempPathFactory) -> Index:
    """The images of `folder` in another format."""
    return scan(FORMATS[request.param](folder, tmp_path_factory.mktemp("formats") / "made"))


def test_same_bytes_and_labels(folder: Index, other: Index) -> None:
    assert len(other) == len(folder)
    assert other.labels is not None and folder.labels is not None and torch.equal(other.labels, folder.labels)
    for i in range(len(folder)):
        assert read_bytes(other.sample(i)) == folder.path(i).read_bytes()
        with open_image(other.sample(i)) as file:
            file.seek(-7, os.SEEK_END)
            assert file.read() == folder.path(i).read_bytes()[-7:]
    if "record" not in other.files[0]:
        assert (other.digest, other.classes) == (folder.digest, folder.classes)
    else:
        assert other.classes == ("1", "2", "3", "4")


def test_same_batches_and_the_same_after_a_resume(folder: Index, other: Index) -> None:
    """10 steps are an epoch of 7 and a part of the next."""
    check_same(batches(other, 0, 10), batches(folder, 0, 10))
    check_same(batches(other, 5, 5), batches(folder, 0, 10)[5:])


def test_same_statistics(folder: Index, other: Index) -> None:
    ours, theirs = statistics(folder), statistics(other)
    assert list(ours.pop("classes").values()) == list(theirs.pop("classes").values())
    assert ours == theirs


@pytest.mark.parametrize("name", FORMATS)
def test_commands(name: str, folder: Index, tmp_path: Path) -> None:
    root = FORMATS[name](folder, tmp_path / "made")
    done = call("data", "stats", root)
    assert (done.code, done.err) == (0, "") and "images   60" in done.out
    grids = []
    for number, source in enumerate((root, folder.root)):
        grids.append(tmp_path / f"{number}.png")
        done = call("data", "view", source, "--output", grids[-1], "--images", "4", "--image-size", "32")
        assert done.code == 0, done.err
    assert grids[0].read_bytes() == grids[1].read_bytes()


@pytest.mark.parametrize("layout", ["folders", "names"])
@pytest.mark.parametrize("kind", ["tar", "tfrecord"])
def test_splits(layout: str, kind: str, jpeg_root: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        index = scan(jpeg_root / split)
        made = tmp_path / "made" / split
        if kind == "tar":
            as_tar(index, made, 2, labels=True)
        else:
            as_tfrecord(index, made, [f"{'validation' if split == 'val' else split}-{i:05}-of-00002" for i in range(2)])
    root = tmp_path / "made"
    if layout == "names":
        root = tmp_path / "together"
        root.mkdir()
        for path in (tmp_path / "made").glob("*/*"):
            path.rename(root / (f"set-{path.parent.name}-{path.name}" if kind == "tar" else path.name))
    test = held_out(root)
    assert test is not None and (len(scan(root)), len(test)) == (60, 12)
    assert read_bytes(test.sample(0)) == (jpeg_root / "val" / "ant" / "000.jpg").read_bytes()


def test_shards_of_one_split_alone_are_that_folder(folder: Index, tmp_path: Path) -> None:
    as_tfrecord(folder, tmp_path, [name.replace("train", "validation") for name in IMAGENET])
    assert len(scan(tmp_path)) == 60
    assert held_out(tmp_path) is None


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_and_foreign_names(format: int, folder: Index, tmp_path: Path) -> None:
    images = [folder.path(i).read_bytes() for i in range(3)]
    names = ["ä" * 120 + "/" + "x" * 90 + ".jpg", "c/a.v2.JPEG", "c/é.jpg"]
    write_tar(tmp_path / "a.tar", zip(names, images, strict=True), format)
    index = scan(tmp_path)
    assert list(index.files) == names
    assert [read_bytes(index.sample(i)) for i in range(3)] == images
    assert index.classes == ("c", "ä" * 120)
    write_list(index, tmp_path / "list.tsv")
    assert scan(tmp_path / "list.tsv").digest == index.digest


def test_what_a_sample_of_a_tar_is(folder: Index, tmp_path: Path) -> None:
    """Extensions begin at the first dot; what is no image of its own is left out, and order is that of the bytes."""
    one, two, three = (folder.path(i).read_bytes() for i in range(3))
    members = [
        ("./b.json", b"{}"),
        ("a.cls", b"-2"),
        ("./b.mask.png", three),
        ("b.JPG", one),
        ("._b.jpg", b"hidden"),
        ("a.seg.jpg", two),
        ("b.CLS", b" 1000\n"),
        ("notes.txt", b"not of a sample"),
    ]
    write_tar(tmp_path / "x.tar", members)
    index = scan(tmp_path)
    assert index.files == ("b.JPG", "a.seg.jpg")
    assert index.labels is not None and index.labels.tolist() == [1, 0]
    assert index.classes == ("-2", "1000")
    assert [read_bytes(index.sample(i)) for i in range(2)] == [one, two]


def test_what_a_record_of_a_tfrecord_is(tmp_path: Path) -> None:
    """Fields that are not known are stepped over, whatever their wire type; numbers have a sign and 64 bits."""
    fixed = bytes([9 << 3 | 1, *range(8), 9 << 3 | 5, *range(4), 9 << 3 | 0, 0x81, 0x01])
    messages = [
        fixed + example({"image/encoded": image, "image/class/label": [label], "other": [0.5]}) + fixed
        for image, label in ((b"one" * 2000, -1), (b"", 2**62))
    ]
    (tmp_path / "x.tfrecord").write_bytes(b"".join(map(framed, messages)))
    index = scan(tmp_path)
    assert index.files == ("x.tfrecord/record-0", "x.tfrecord/record-1")
    assert str(index.sample(1)) == f"{tmp_path / 'x.tfrecord'}: record-1"
    assert index.classes == ("-1", str(2**62))
    assert [read_bytes(index.sample(i)) for i in range(2)] == [b"one" * 2000, b""]


def test_names_that_repeat_over_shards(folder: Index, tmp_path: Path) -> None:
    for number in range(2):
        write_tar(tmp_path / f"{number}.tar", [("0.jpg", folder.path(number).read_bytes())])
    index = scan(tmp_path)
    assert index.files == ("0.tar/0.jpg", "1.tar/0.jpg")
    assert str(index.sample(1)) == f"{tmp_path / '1.tar'}: 0.jpg"
    assert index.take([1, 0]).sample(0) == index.sample(1)


def test_folders_that_contradict_the_numbers_are_not_names(folder: Index, tmp_path: Path) -> None:
    image = folder.path(0).read_bytes()
    members = [("a/1.jpg", image), ("a/1.cls", b"0"), ("a/2.jpg", image), ("a/2.cls", b"5")]
    write_tar(tmp_path / "x.tar", members)
    assert scan(tmp_path).classes == ("0", "5")


def test_dali_reads_the_same_from_tar(folder: Index, tmp_path: Path) -> None:
    index = scan(tar_with_numbers(folder, tmp_path / "made"))
    assert index.labels is not None
    paths = [str(shard.path) for shard in index.shards]
    found = dali_reads(60, lambda fn: tuple(fn.readers.webdataset(paths=paths, ext=["jpg", "cls"])))
    ours = [[read_bytes(index.sample(i)), str(index.labels[i].item()).encode()] for i in range(60)]
    assert found == ours


def test_dali_reads_the_same_from_tfrecord(folder: Index, tmp_path: Path) -> None:
    from nvidia.dali import tfrecord as features

    index = scan(imagenet(folder, tmp_path / "made"))
    assert index.labels is not None
    wanted = {
        "image/encoded": features.FixedLenFeature((), features.string, ""),
        "image/class/label": features.FixedLenFeature([1], features.int64, -1),
    }
    paths = [str(shard.path) for shard in index.shards]
    for path in paths:  # DALI wants each record's offset and length
        data, lines, at = Path(path).read_bytes(), "", 0
        while at < len(data):
            length = int.from_bytes(data[at : at + 8], "little") + 16
            lines += f"{at} {length}\n"
            at += length
        Path(f"{path}.idx").write_text(lines)

    def read(fn: Any) -> tuple[Any, ...]:
        outputs = fn.readers.tfrecord(path=paths, index_path=[f"{path}.idx" for path in paths], features=wanted)
        return tuple(outputs[name] for name in wanted)

    numbers = [int(index.classes[label]) for label in index.labels]
    assert dali_reads(60, read) == [[read_bytes(index.sample(i)), numbers[i].to_bytes(8, "little")] for i in range(60)]


def changed(shard: Path, change: Callable[[bytes], bytes]) -> None:
    shard.write_bytes(change(shard.read_bytes()))


def replaced(shard: Path) -> None:
    """Another file of the same size in its place."""
    shard.with_name("new").write_bytes(bytes(reversed(shard.read_bytes())))
    shard.with_name("new").rename(shard)


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (lambda shard: changed(shard, lambda data: data[:-20000]), "changed after it was indexed"),
    "replaced": (replaced, "was written anew"),
    "gone": (Path.unlink, "cannot be read: No such file"),
}


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("make", [one_tar, tfrecord])
def test_a_shard_that_changes_after_it_was_indexed(
    kind: str, make: Callable[[Index, Path], Path], folder: Index, tmp_path: Path
) -> None:
    index = scan(make(folder, tmp_path / "made"))
    change, message = CHANGES[kind]
    change(index.shards[0].path)
    with pytest.raises(UserError, match=message) as caught:
        batches(index, 0, 7)
    assert str(index.shards[0].path) in str(caught.value)


def test_a_shard_cut_while_it_is_open(folder: Index, tmp_path: Path) -> None:
    """No batch after the cut may be made of it, even of images before the cut: nothing vouches for them."""
    index = scan(one_tar(folder, tmp_path / "made"))
    assert read_bytes(index.sample(0))
    os.truncate(index.shards[0].path, index.shards[0].size // 2)
    for i in (0, 59):
        with pytest.raises(UserError, match="changed after it was indexed"):
            read_bytes(index.sample(i))
    samples.close_shards()


def test_a_broken_image_in_a_shard_is_named(folder: Index, tmp_path: Path) -> None:
    members = [(folder.files[i], folder.path(i).read_bytes()) for i in range(16)]
    members[5] = (members[5][0], members[5][1][:-300])
    members[6] = (members[6][0], b"text")
    write_tar(tmp_path / "x.tar", members)
    with pytest.raises(UserError) as caught:
        batches(scan(tmp_path), 0, 2)
    assert f"{tmp_path / 'x.tar'}: " in str(caught.value)
    assert members[5][0] in str(caught.value) or members[6][0] in str(caught.value)
    [message] = statistics(scan(tmp_path))["unreadable"]
    assert f"{tmp_path / 'x.tar'}: {members[6][0]}" in message


def open_shards(index: Index) -> set[Path]:
    """Those that this process has open."""
    return {shard.path.resolve() for shard in index.shards} & {
        entry.resolve() for entry in Path("/proc/self/fd").iterdir()
    }


def test_open_shards_are_bounded_and_closed(folder: Index, tmp_path: Path) -> None:
    count = 600
    image = folder.path(0).read_bytes()
    for number in range(count):
        write_tar(tmp_path / f"{number:04}.tar", [(f"{number}.jpg", image)])
    index = scan(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        rows = list(range(count)) * 3
        assert all(data == image for data in pool.map(lambda i: read_bytes(index.sample(i)), rows))
    assert len(open_shards(index)) == 512
    samples.close_shards()
    assert not open_shards(index)


def test_a_loader_that_is_closed_has_no_shard_open(folder: Index, tmp_path: Path) -> None:
    index = scan(tar_with_numbers(folder, tmp_path / "made"))
    batches(index, 0, 3)
    assert not open_shards(index)
