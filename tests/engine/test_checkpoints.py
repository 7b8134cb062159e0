"""Checkpoints are whole or absent, and what is kept stays."""

import contextlib
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from synco_fast.config import key_paths
from synco_fast.engine import checkpoints
from synco_fast.errors import UserError
from tests.command import call, contents
from tests.engine.runs import differences

LIMIT = 200_000


def state(numbers: int) -> dict[str, Any]:
    """A checkpoint's entries, with a tensor of float32 numbers."""
    entries: dict[str, Any] = {name: {} for name in ("config", "data", "loader", "model", "optimizer", "meter", "rng")}
    return entries | {"step": 3, "model": {"weight": torch.arange(float(numbers))}}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of LIMIT bytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={LIMIT}", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@contextlib.contextmanager
def small_files() -> Iterator[None]:
    """No file may grow beyond LIMIT bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def check_failed_write(output: Path, keep_as_epoch: int | None, reason: str) -> None:
    """Beyond LIMIT: an error that names file and reason, and the folder as it was."""
    before = contents(output)
    failing = "latest.pt" if keep_as_epoch is None else f"epoch-{keep_as_epoch:04d}.pt"
    with pytest.raises(UserError, match=rf"{failing}: cannot write it: {reason}"):
        checkpoints.save(output, state(LIMIT), keep_as_epoch=keep_as_epoch)
    assert contents(output) == before
    assert differences(checkpoints.load(checkpoints.folder(output) / checkpoints.LATEST), state(10)) == []


@pytest.mark.parametrize("keep_as_epoch", [None, 20])
def test_a_full_disk(keep_as_epoch: int | None, small_disk: Path) -> None:
    checkpoints.folder(small_disk).mkdir()
    checkpoints.save(small_disk, state(10), keep_as_epoch=None)
    check_failed_write(small_disk, keep_as_epoch, "No space left on device")


@pytest.mark.parametrize("keep_as_epoch", [None, 20])
def test_a_write_that_fails_half_way(keep_as_epoch: int | None, tmp_path: Path) -> None:
    checkpoints.folder(tmp_path).mkdir()
    checkpoints.save(tmp_path, state(10), keep_as_epoch=None)
    with small_files():
        check_failed_write(tmp_path, keep_as_epoch, "File too large")


def test_stopped_between_the_kept_one_and_latest(tmp_path: Path) -> None:
    """A run that goes on from `latest` comes by this epoch again; the other way round it would be lost."""
    folder = checkpoints.folder(tmp_path)
    folder.mkdir()
    checkpoints.save(tmp_path, state(10), keep_as_epoch=None)
    in_the_way = folder / ".latest.pt.tmp"
    in_the_way.mkdir()
    with pytest.raises(UserError, match=r"latest\.pt: cannot write it"):
        checkpoints.save(tmp_path, state(20), keep_as_epoch=20)
    assert differences(checkpoints.load(folder / "epoch-0020.pt"), state(20)) == []
    assert differences(checkpoints.load(folder / checkpoints.LATEST), state(10)) == []
    in_the_way.rmdir()
    checkpoints.save(tmp_path, state(30), keep_as_epoch=20)
    assert {path.name for path in folder.iterdir()} == {"epoch-0020.pt", "latest.pt"}
    for name in ("epoch-0020.pt", "latest.pt"):
        assert differences(checkpoints.load(folder / name), state(30)) == []


def test_kept_epochs(images: Path, tiny: Path, tmp_path: Path) -> None:
    """Two steps an epoch, every second epoch and the last kept; going on from a kept one ends in the same state."""
    settings = [
        "data.batch_size=48",
        "queue.size=48",
        "trainer.epochs=3",
        "optim.momentum=0",  # a third less to write
        "checkpoint={keep_every: 2, every_epochs: 2}",
    ]
    options = [part for setting in settings for part in ("--set", setting)]
    outputs = tmp_path / "one", tmp_path / "two"
    done = call("pretrain", tiny, "--data", images, *options, "--set", f"output={outputs[0]}")
    assert done.code == 0, done.err
    folder = checkpoints.folder(outputs[0])
    assert {path.name for path in folder.iterdir()} == {"epoch-0002.pt", "epoch-0003.pt", "latest.pt"}
    kept = {name: torch.load(folder / name, weights_only=True) for name in ("epoch-0002.pt", "latest.pt")}
    assert {name: entries["step"] for name, entries in kept.items()} == {"epoch-0002.pt": 4, "latest.pt": 6}
    assert (folder / "epoch-0003.pt").read_bytes() == (folder / "latest.pt").read_bytes()

    resume = ("--resume", folder / "epoch-0002.pt")
    done = call("pretrain", tiny, "--data", images, *options, "--set", f"output={outputs[1]}", *resume)
    assert done.code == 0, done.err
    again = checkpoints.load(checkpoints.folder(outputs[1]) / checkpoints.LATEST)
    for entries in (again, kept["latest.pt"]):
        del entries["config"]["output"]
    assert differences(again, kept["latest.pt"]) == []


def test_keys_that_may_differ_exist() -> None:
    assert set(key_paths()) >= checkpoints._FREE
