"""`synco-fast data pack`: the same images in the same order, under any source, any name, and any number of kills."""

import os
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from synco_fast.data.index import Index, held_out, scan
from synco_fast.data.listing import write_list
from synco_fast.data.samples import read_bytes
from synco_fast.data.shards import INDEX_NAME
from tests.command import call, check_error, contents
from tests.conftest import SYNCO_FAST, environment
from tests.formats import FORMATS, batches, check_same, dali_reads, write_tar, write_tfrecord

SIZE = "0.05"


@pytest.fixture(scope="module")
def packed(jpeg_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("packed") / "a" / "b"
    done = call("data", "pack", jpeg_root, output, "--shard-size", SIZE)
    assert done.code == 0, done.err
    assert [line for line in done.err.splitlines() if not line.startswith(f"wrote {output}")] == []
    assert f"{output / 'train'}: 60 images in" in done.out and f"{output / 'val'}: 12 images in" in done.out
    return output


def all_bytes(index: Index) -> list[bytes]:
    return [read_bytes(index.sample(i)) for i in range(len(index))]


def check_same_set(ours: Index, theirs: Index) -> None:
    assert (ours.digest, ours.files, ours.classes) == (theirs.digest, theirs.files, theirs.classes)
    assert all_bytes(ours) == all_bytes(theirs)


def test_a_packed_set_is_its_source(packed: Path, jpeg_root: Path) -> None:
    """A run begun on the folder can go on with the pack, as digest and batches are the same."""
    check_same_set(scan(packed), scan(jpeg_root))
    val, source_val = held_out(packed), held_out(jpeg_root)
    assert val is not None and source_val is not None
    check_same_set(val, source_val)
    check_same(batches(scan(packed), 0, 9), batches(scan(jpeg_root), 0, 9))
    check_same(batches(scan(packed), 4, 5), batches(scan(jpeg_root), 0, 9)[4:])


def test_shards_without_their_index_say_the_same(packed: Path, tmp_path: Path) -> None:
    shutil.copytree(packed, tmp_path / "copy")
    (tmp_path / "copy" / "train" / INDEX_NAME).unlink()
    listed, scanned = scan(packed), scan(tmp_path / "copy")
    check_same_set(listed, scanned)
    assert listed.extents is not None and scanned.extents is not None and torch.equal(listed.extents, scanned.extents)


def test_shards_are_plain_tar_files_of_the_size_asked_for(packed: Path, jpeg_root: Path, tmp_path: Path) -> None:
    shards = sorted((packed / "train").glob("shard-*.tar"))
    assert [shard.name for shard in shards] == [f"shard-{i:06}.tar" for i in range(len(shards))]
    sizes = [shard.stat().st_size for shard in shards]
    assert len(shards) > 3 and max(sizes) <= 50_000 and min(sizes[:-1]) > 25_000
    for shard in shards:
        with tarfile.open(shard) as archive:
            archive.extractall(tmp_path, filter="data")
    unpacked = scan(tmp_path)
    check_same_set(unpacked, scan(jpeg_root))
    assert unpacked.labels is not None
    for name, label in zip(unpacked.files, unpacked.labels.tolist(), strict=True):
        assert (tmp_path / name).with_suffix(".cls").read_text() == str(label)


def test_dali_reads_the_same(packed: Path) -> None:
    index = scan(packed)
    assert index.labels is not None
    paths = [str(shard.path) for shard in index.shards]
    found = dali_reads(60, lambda fn: tuple(fn.readers.webdataset(paths=paths, ext=["jpg", "cls"])))
    labels = [str(label).encode() for label in index.labels.tolist()]
    assert found == [[data, label] for data, label in zip(all_bytes(index), labels, strict=True)]


def test_one_image_may_exceed_the_size(jpeg_root: Path, tmp_path: Path) -> None:
    done = call("data", "pack", jpeg_root / "val", tmp_path / "out", "--shard-size", "0.000001")
    assert f"{tmp_path / 'out'}: 12 images in 12 shards" in done.out
    check_same_set(scan(tmp_path / "out"), scan(jpeg_root / "val"))


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_can_be_packed(name: str, jpeg_root: Path, tmp_path: Path) -> None:
    folder = scan(jpeg_root)
    source = FORMATS[name](folder, tmp_path / "made")
    done = call("data", "pack", source, tmp_path / "out", "--shard-size", SIZE)
    assert done.code == 0, done.err
    [output] = {Path(line.rpartition(": ")[0]) for line in done.out.splitlines()}
    index = scan(output)
    assert all_bytes(index) == all_bytes(folder)
    assert index.classes == scan(source).classes
    assert index.labels is not None and folder.labels is not None and torch.equal(index.labels, folder.labels)
    (output / INDEX_NAME).unlink()
    check_same_set(scan(output), index)


def test_names_that_a_tar_cannot_have(jpeg_root: Path, tmp_path: Path) -> None:
    """Keys end at the first dot and are unique, and only classes are folders; contents stay apart all the same."""
    originals = sorted((jpeg_root / "train" / "ant").iterdir())
    names = ["a.b.jpg", "a.c.jpg", "a_b.jpg", "a.jpg", "a.png", "a-1.png", "x/a.jpg", "ü ö.JPEG"]
    for name, original in zip(names, originals, strict=False):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(original, tmp_path / "in" / name)
    (tmp_path / "in" / "list.txt").write_text("\n".join(names))
    source = scan(tmp_path / "in" / "list.txt")
    assert call("data", "pack", tmp_path / "in" / "list.txt", tmp_path / "out").code == 0
    index = scan(tmp_path / "out")
    assert len(index) == 8 and index.labels is None and all_bytes(index) == all_bytes(source)
    (tmp_path / "out" / INDEX_NAME).unlink()
    check_same_set(scan(tmp_path / "out"), index)


def test_broken_images_are_copied_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, content in (("a.jpg", b""), ("b.jpg", b"text"), ("c.jpg", b"x" * 512)):
        (tmp_path / "in" / name).write_bytes(content)
    assert call("data", "pack", tmp_path / "in", tmp_path / "out").code == 0
    check_same_set(scan(tmp_path / "out"), scan(tmp_path / "in"))


def test_broken_records_are_copied_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    broken = (b"text", b"", b"x" * 99)
    write_tfrecord(tmp_path / "in" / "a.tfrecord", [{"image/encoded": content} for content in broken])
    assert call("data", "pack", tmp_path / "in", tmp_path / "out").code == 0
    assert all_bytes(scan(tmp_path / "out")) == all_bytes(scan(tmp_path / "in")) == [*broken]


def test_classes_keep_their_names_and_numbers(jpeg_root: Path, tmp_path: Path) -> None:
    """Also one without images, which the shards alone cannot tell of."""
    folder = scan(jpeg_root)
    source = folder.take([i for i, name in enumerate(folder.files) if not name.startswith("bee")])
    write_list(source, tmp_path / "list.tsv")
    assert call("data", "pack", tmp_path / "list.tsv", tmp_path / "out").code == 0
    check_same_set(scan(tmp_path / "out"), source)


def many_files(folder: Path) -> None:
    random = np.random.default_rng(2)
    for i in range(1500):
        path = folder / f"class{i % 3}" / f"{i:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(random.bytes(int(random.integers(1, 3000))))


def killed(command: list[str], output: Path, shards: int) -> None:
    """Start packing, and kill it when so many shards are there."""
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 120
        while len(list(output.glob("shard-*.tar"))) < shards:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.001)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (output / INDEX_NAME).exists()


def test_kills_leave_no_trace(tmp_path: Path) -> None:
    many_files(tmp_path / "in")
    assert call("data", "pack", tmp_path / "in", tmp_path / "whole", "--shard-size", "0.01").code == 0
    whole = contents(tmp_path / "whole")
    output = tmp_path / "out"
    command = [*SYNCO_FAST, "data", "pack", str(tmp_path / "in"), str(output), "--shard-size", "0.01"]
    for shards in (1, 40, 120):
        killed(command, output, shards)
        left = {name: digest for name, digest in contents(output).items() if not name.startswith(".")}
        assert left.items() <= whole.items() and shards <= len(left) - 1 < len(whole) - 2
    complete = output / "shard-000000.tar"
    before = complete.stat().st_mtime_ns
    (output / f".shard-{shards + 1:06}.tar.tmp").write_bytes(b"left by a kill")
    assert call(*command[len(SYNCO_FAST) :]).code == 0
    found = {name: digest for name, digest in contents(output).items() if not name.startswith(".")}
    assert found == whole
    assert complete.stat().st_mtime_ns == before
    assert call(*command[len(SYNCO_FAST) :]).code == 0  # nothing left to do
    assert complete.stat().st_mtime_ns == before


def other_source(output: Path, source: Path) -> tuple[Path, str]:
    return source.parent / "val", SIZE


def other_size(output: Path, source: Path) -> tuple[Path, str]:
    return source, "1"


def somebodys_folder(output: Path, source: Path) -> tuple[Path, str]:
    shutil.rmtree(output)
    output.mkdir()
    (output / "notes.txt").write_text("somebody's")
    return source, SIZE


def somebodys_shard(output: Path, source: Path) -> tuple[Path, str]:
    write_tar(output / "shard-000000.tar", [("a.jpg", b"x")])
    return source, SIZE


def broken_shard(output: Path, source: Path) -> tuple[Path, str]:
    os.truncate(output / "shard-000001.tar", 9000)
    return source, SIZE


def broken_state(output: Path, source: Path) -> tuple[Path, str]:
    (output / "pack.json").write_bytes(b"\xff{")
    return source, SIZE


REFUSED: dict[str, tuple[Callable[[Path, Path], tuple[Path, str]], tuple[str, ...]]] = {
    "another source": (other_source, ("another pack", "pack.json", '"images": 60', '"images": 12')),
    "another size": (other_size, ("another pack", "50000", "1000000")),
    "somebody's folder": (somebodys_folder, ("notes.txt", "empty folder")),
    "somebody's shard": (somebodys_shard, ("shard-000000.tar", "other images")),
    "broken shard": (broken_shard, ("shard-000001.tar", "cut short")),
    "broken state": (broken_state, ("pack.json",)),
    "no size": (lambda output, source: (source, "0"), ("--shard-size 0",)),
    "size that is no number": (lambda output, source: (source, "nan"), ("--shard-size nan",)),
    "missing source": (lambda output, source: (source / "gone", SIZE), ("gone", "does not exist")),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind: str, packed: Path, jpeg_root: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(packed / "train", output)
    change, names = REFUSED[kind]
    source, size = change(output, jpeg_root / "train")
    before = contents(output)
    done = call("data", "pack", source, output, "--shard-size", size)
    check_error(done.code, done.err, names)
    assert (done.code, done.out, contents(output)) == (1, "", before)


def test_source_and_output_that_are_one(jpeg_root: Path) -> None:
    before = contents(jpeg_root)
    done = call("data", "pack", jpeg_root, jpeg_root)
    check_error(done.code, done.err, (str(jpeg_root / "train"), "ant"))
    assert contents(jpeg_root) == before


def test_an_unreadable_image_stops_it_and_then_it_goes_on(jpeg_root: Path, tmp_path: Path) -> None:
    shutil.copytree(jpeg_root / "train", tmp_path / "in")
    victim = tmp_path / "in" / "cat" / "007.jpg"
    victim.unlink()
    victim.symlink_to("gone.jpg")
    done = call("data", "pack", tmp_path / "in", tmp_path / "out", "--shard-size", SIZE)
    check_error(done.code, done.err, (str(victim), "No such file"))
    assert not list((tmp_path / "out").glob(".*"))
    assert not (tmp_path / "out" / INDEX_NAME).exists()
    victim.unlink()
    shutil.copy(jpeg_root / "train" / "cat" / "007.jpg", victim)
    assert call("data", "pack", tmp_path / "in", tmp_path / "out", "--shard-size", SIZE).code == 0
    check_same_set(scan(tmp_path / "out"), scan(jpeg_root))


def test_names_that_no_list_holds_are_refused_first(jpeg_root: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    shutil.copy(jpeg_root / "train" / "ant" / "000.jpg", tmp_path / "in" / "a\tb.jpg")
    done = call("data", "pack", tmp_path / "in", tmp_path / "out")
    check_error(done.code, done.err, (r"a\tb.jpg", "rename"))
    assert not (tmp_path / "out").exists()


STALE: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "grown": (lambda folder: (folder / "shard-000001.tar").open("ab").write(b"x"), ("shard-000001.tar has", "but")),
    "gone": (lambda folder: (folder / "shard-000001.tar").unlink(), ("shard-000001.tar", "No such file")),
    "more": (lambda folder: write_tar(folder / "more.tar", [("a.jpg", b"x")]), ("more.tar", "does not list")),
}


@pytest.mark.parametrize("kind", STALE)
def test_an_index_that_does_not_fit_its_shards(kind: str, packed: Path, tmp_path: Path) -> None:
    shutil.copytree(packed, tmp_path / "copy")
    change, names = STALE[kind]
    change(tmp_path / "copy" / "train")
    done = call("data", "stats", tmp_path / "copy")
    check_error(done.code, done.err, (INDEX_NAME, *names))
    assert (done.code, done.out) == (1, "")


def test_a_run_moves_from_folder_to_pack(tiny: Path, images: Path, tmp_path: Path) -> None:
    """Two steps on files, two more on shards: the checkpoint knows the data set by its digest."""
    run, packed = tmp_path / "run", tmp_path / "packed"
    assert call("data", "pack", images, packed).code == 0
    options = ["--set", f"output={run}", "--set", "knn={every_epochs: 1, k: 5}"]
    assert call("pretrain", tiny, "--data", images, *options, "--set", "trainer.max_steps=2").code == 0
    done = call("pretrain", tiny, "--data", packed, *options, "--set", "trainer.max_steps=4", "--resume", "auto")
    assert done.code == 0, done.err
    done = call("knn", run / "checkpoints" / "latest.pt", "--data", packed, "--k", "5", "--output", tmp_path / "knn")
    assert done.code == 0 and "bank 100, held out 20" in done.out
