"""Checkpoints are whole or absent, what is kept stays, and what cannot be written costs nothing that was."""

import contextlib
import errno
import os
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from synco_fast.config import key_paths
from synco_fast.engine import checkpoints
from synco_fast.engine.run import to_go_on_with
from synco_fast.engine.writer import CheckpointWriter
from synco_fast.errors import UserError
from synco_fast.files import symlink
from tests.command import call
from tests.disks import mounted
from tests.engine.runs import differences

LIMIT = 200_000


def state(step: int, numbers: int = 10) -> dict[str, Any]:
    """A checkpoint's entries, with a tensor of float32 numbers."""
    entries: dict[str, Any] = {name: {} for name in ("config", "data", "loader", "model", "optimizer", "meter", "rng")}
    return entries | {"step": step, "model": {"weight": torch.arange(float(numbers)) + step}}


class Writer(CheckpointWriter):
    """Of a folder, with what it has said."""

    def __init__(
        self, output: Path, *, recent: int = 2, hours: float = 0.0, before: Sequence[Callable[[], Any]] = ()
    ) -> None:
        self.said: list[str] = []
        self.folder = checkpoints.folder(output)
        self.folder.mkdir(exist_ok=True)
        super().__init__(self.folder, recent=recent, hours=hours, before=before, warn=self.said.append)

    def saved(self, step: int, numbers: int = 10, keep: int | None = None) -> "Writer":
        self.save(state(step, numbers), keep_as_epoch=keep)
        self.wait()
        return self

    def names(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()}

    def latest(self) -> int:
        return int(checkpoints.load(self.folder / checkpoints.LATEST)["step"])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of LIMIT bytes."""
    with mounted(tmp_path / "disk", LIMIT) as disk:
        yield disk


@contextlib.contextmanager
def small_files() -> Iterator[None]:
    """No file may grow beyond LIMIT bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_newest_stay_and_epochs_for_good(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    for step, keep in ((1, None), (2, 1), (3, None), (4, None)):
        writer.saved(step, keep=keep)
    assert writer.names() == {"step-00000003.pt", "step-00000004.pt", "epoch-0001.pt", "latest.pt"}
    assert writer.latest() == 4 and os.readlink(writer.folder / "latest.pt") == "step-00000004.pt"
    assert differences(checkpoints.load(writer.folder / "epoch-0001.pt"), state(2)) == []
    young = Writer(tmp_path, recent=1, hours=1.0).saved(5)
    assert len(young.names()) == 5
    os.utime(young.folder / "step-00000003.pt", (0, time.time() - 3700))
    assert "step-00000003.pt" not in young.saved(6).names() and "step-00000004.pt" in young.names()


def test_one_gone_back_to_is_not_undone_by_later_ones(tmp_path: Path) -> None:
    """Going on from before them, what a run wrote in its first life neither goes nor counts."""
    writer = Writer(tmp_path, recent=3)
    for step in (10, 20, 30):
        writer.saved(step)
    Writer(tmp_path, recent=1).saved(12)
    assert writer.names() == {"step-00000012.pt", "step-00000020.pt", "step-00000030.pt", "latest.pt"}
    assert writer.latest() == 12
    (writer.folder / "step-00000012.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"latest\.pt: not a readable checkpoint"):
        checkpoints.newest(tmp_path, print)


def test_a_state_may_change_once_it_is_being_saved(tmp_path: Path) -> None:
    writer, given = Writer(tmp_path), state(1, 1_000_000)
    writer.save(given, keep_as_epoch=None)
    given["model"]["weight"].zero_()
    writer.finish()
    assert differences(checkpoints.load(writer.folder / "latest.pt"), state(1, 1_000_000)) == []


def check_failed_write(writer: Writer, keep: int | None, reason: str) -> None:
    """Beyond LIMIT: a warning that names file and reason, the folder as it was, and an error at the end only."""
    before = {path.name: path.read_bytes() for path in writer.folder.iterdir()}
    writer.saved(20, LIMIT, keep)
    assert len(writer.said) == 1 and "the run goes on" in writer.said[0]
    assert f"step-00000020.pt: cannot write it: {reason}" in writer.said[0]
    assert {path.name: path.read_bytes() for path in writer.folder.iterdir()} == before and writer.latest() == 10
    assert reason in str(writer.finish())


@pytest.mark.parametrize("keep", [None, 20])
def test_a_full_disk(keep: int | None, small_disk: Path) -> None:
    """And once there is room, the next one is written as if nothing had been."""
    writer = Writer(small_disk).saved(10)
    check_failed_write(writer, keep, "No space left on device")
    assert writer.saved(30).finish() is None
    assert writer.latest() == 30


@pytest.mark.parametrize("keep", [None, 20])
def test_a_write_that_fails_half_way(keep: int | None, tmp_path: Path) -> None:
    writer = Writer(tmp_path).saved(10)
    with small_files():
        check_failed_write(writer, keep, "File too large")


def test_what_it_stands_for_comes_first(tmp_path: Path) -> None:
    """Rows that cannot be written: no checkpoint that says that they are."""

    def fail() -> None:
        raise UserError("metrics.jsonl: cannot write it")

    writer = Writer(tmp_path, before=(fail,)).saved(10)
    assert writer.names() == set() and "metrics.jsonl: cannot write it" in writer.said[0]


@pytest.mark.parametrize("place", ["epoch-0020.pt", "latest.pt"])
def test_stopped_between_two_names(place: str, tmp_path: Path) -> None:
    """A run that goes on from `latest` comes by this step again; the other way round the kept one would be lost."""
    writer = Writer(tmp_path).saved(10)
    in_the_way = writer.folder / f".{place}.tmp"
    in_the_way.mkdir()
    writer.saved(20, keep=20)
    assert f"{place}: cannot write it" in writer.said[0] and writer.latest() == 10
    in_the_way.rmdir()
    assert writer.saved(20, keep=20).finish() is None
    assert writer.latest() == 20 and (writer.folder / "epoch-0020.pt").samefile(writer.folder / "latest.pt")


def test_what_a_killed_process_left_is_swept_away(tmp_path: Path) -> None:
    writer = Writer(tmp_path).saved(10)
    (writer.folder / ".step-00000013.pt.tmp").write_bytes(b"half")
    assert Writer(tmp_path).names() == {"step-00000010.pt", "latest.pt"}


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "empty"])
def test_a_damaged_newest_one(damage: str, tmp_path: Path) -> None:
    """The one before is taken, loudly, and the damaged one stays as it is."""
    writer = Writer(tmp_path, recent=3)
    for step in (10, 20, 30):
        writer.saved(step)
    newest = writer.folder / "step-00000030.pt"
    content = newest.read_bytes()
    where = content.index(state(30)["model"]["weight"].numpy().tobytes())
    flipped = content[:where] + bytes([content[where] ^ 1]) + content[where + 1 :]
    newest.write_bytes({"cut": content[:-1], "flipped": flipped, "gone": b"", "empty": b""}[damage])
    if damage == "gone":
        newest.unlink()
    said: list[str] = []
    found = checkpoints.newest(tmp_path, said.append)
    assert found is not None and found[0].name == "step-00000020.pt" and found[1]["step"] == 20
    (text,) = said
    assert text.startswith("warning: ") and "latest.pt" in text and "step-00000020.pt, in its place" in text


def test_kept_epochs_are_gone_back_to_last(tmp_path: Path) -> None:
    writer = Writer(tmp_path, recent=1).saved(10, keep=1).saved(20, keep=2).saved(30)
    (writer.folder / "step-00000030.pt").write_bytes(b"")
    found = checkpoints.newest(tmp_path, print)
    assert found is not None and found[0].name == "epoch-0002.pt"
    for name in ("epoch-0002.pt", "epoch-0001.pt"):
        (writer.folder / name).write_bytes(b"")
    with pytest.raises(UserError, match=r"latest\.pt: not a readable checkpoint"):
        checkpoints.newest(tmp_path, print)


@pytest.mark.parametrize("left", ["step-00000020.pt", "epoch-0002.pt"])
def test_a_link_that_is_gone(left: str, tmp_path: Path) -> None:
    """As a copy without links leaves it: what is there is gone on from, loudly, and not begun anew."""
    writer = Writer(tmp_path).saved(20, keep=2)
    for path in writer.folder.iterdir():
        if path.name != left:
            path.unlink()
    said: list[str] = []
    found = checkpoints.newest(tmp_path, said.append)
    assert found is not None and found[0].name == left and found[1]["step"] == 20
    assert "latest.pt: cannot read the checkpoint: No such file" in said[0]
    with pytest.raises(UserError, match="already holds a run"):
        to_go_on_with(tmp_path, None)


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    for other in (None, "notes.txt", ".step-00000003.pt.tmp"):
        if other is not None:
            checkpoints.folder(tmp_path).mkdir(exist_ok=True)
            (checkpoints.folder(tmp_path) / other).write_bytes(b"")
        assert checkpoints.newest(tmp_path, print) is None and to_go_on_with(tmp_path, None) == (None, {})


def test_a_link_replaces_a_file(tmp_path: Path) -> None:
    """As versions before this one left it."""
    (tmp_path / "latest.pt").write_bytes(b"old")
    (tmp_path / "new").write_bytes(b"new")
    symlink("new", tmp_path / "latest.pt")
    assert (tmp_path / "latest.pt").read_bytes() == b"new" and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("lacks", ["symlink", "link"])
def test_a_file_system_without_links(lacks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the kernel answers for vfat: copies take their place, and what is gone back to is found all the same."""

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, lacks, refuse)
    writer = Writer(tmp_path).saved(10).saved(20, keep=2)
    assert writer.said == [] and writer.latest() == 20
    assert writer.names() == {"step-00000010.pt", "step-00000020.pt", "epoch-0002.pt", "latest.pt"}
    assert differences(checkpoints.load(writer.folder / "epoch-0002.pt"), state(20)) == []
    for name in ("latest.pt", "step-00000020.pt", "epoch-0002.pt"):
        (writer.folder / name).write_bytes(b"")
    found = checkpoints.newest(tmp_path, print)
    assert found is not None and found[1]["step"] == 10


def test_kept_epochs(images: Path, tiny: Path, tmp_path: Path) -> None:
    """Two steps an epoch, every second epoch and the last kept; going on from a kept one ends in the same state."""
    settings = [
        "data.batch_size=48",
        "queue.size=48",
        "trainer.epochs=3",
        "checkpoint={keep_every: 2, every_epochs: 2, recent: 1}",
    ]
    options = [part for setting in settings for part in ("--set", setting)]
    outputs = tmp_path / "one", tmp_path / "two"
    done = call("pretrain", tiny, "--data", images, *options, "--set", f"output={outputs[0]}")
    assert done.code == 0, done.err
    folder = checkpoints.folder(outputs[0])
    assert {path.name for path in folder.iterdir()} == {
        "epoch-0002.pt",
        "epoch-0003.pt",
        "step-00000006.pt",
        "latest.pt",
    }
    kept = {name: torch.load(folder / name, weights_only=True) for name in ("epoch-0002.pt", "latest.pt")}
    assert {name: entries["step"] for name, entries in kept.items()} == {"epoch-0002.pt": 4, "latest.pt": 6}
    assert (folder / "epoch-0003.pt").samefile(folder / "latest.pt")

    resume = ("--resume", folder / "epoch-0002.pt")
    done = call("pretrain", tiny, "--data", images, *options, "--set", f"output={outputs[1]}", *resume)
    assert done.code == 0, done.err
    again = checkpoints.load(checkpoints.folder(outputs[1]) / checkpoints.LATEST)
    for entries in (again, kept["latest.pt"]):
        del entries["config"]["output"], entries["rows"]  # whose file is the other folder's
    assert differences(again, kept["latest.pt"]) == []


def test_keys_that_may_differ_exist() -> None:
    assert set(key_paths()) >= checkpoints._FREE
