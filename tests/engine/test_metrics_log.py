"""metrics.jsonl: no row is lost to a disk that fails, and a damaged one costs no other."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from synco_fast.engine.metrics import MetricsLog
from synco_fast.errors import UserError
from synco_fast.files import read_json_lines


def steps(path: Path) -> list[int]:
    return [row["step"] for row in read_json_lines(path)]


def written(folder: Path, *numbers: int, start: int = 0, said: list[str] | None = None) -> MetricsLog:
    """A log with rows of these steps after those of each step up to `start`, not closed yet."""
    folder.mkdir(exist_ok=True)
    log = MetricsLog(folder, start, start, ([] if said is None else said).append)
    for number in numbers:
        log.write({"kind": "train", "step": number, "epoch": 0, "loss": 0.5})
    return log


def test_rows_that_a_disk_did_not_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed fsync is told once, and the system has forgotten by then what it had accepted: all of it comes again,
    at its place, the rows of before untouched."""
    log = written(tmp_path / "run", 1, 2)
    log.sync()
    log.write({"kind": "train", "step": 3, "epoch": 0})
    safe = log._safe

    def fail(descriptor: int) -> None:
        os.pwrite(descriptor, bytes(10), safe)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(UserError, match=r"metrics\.jsonl: cannot write it: Input/output error"):
            log.sync()
    assert steps(log.path) == [1, 2]
    log.write({"kind": "train", "step": 4, "epoch": 0})
    log.sync()
    log.close()
    assert steps(log.path) == [1, 2, 3, 4] and log.path.stat().st_size == log._safe


_INFINITE = b'"step": 2, "epoch": 0, "loss": 5e9999'
DAMAGES: dict[str, tuple[Callable[[bytes], bytes], list[int]]] = {
    "no UTF-8": (lambda content: content.replace(b'"step": 2', b'"st\xffp": 2'), [1, 3, 4]),
    "another name": (lambda content: content.replace(b'"step": 2', b'"stop": 2'), [1, 3, 4]),
    "another step": (lambda content: content.replace(b'"step": 2', b'"step": 9'), [1, 3, 4]),
    "another exponent": (lambda content: content.replace(b'"step": 2, "epoch": 0, "loss": 0.5', _INFINITE), [1, 3, 4]),
    "not an object": (lambda content: content.replace(content.split(b"\n")[1], b"17"), [1, 3, 4]),
    "two in a line": (lambda content: content.replace(b'\n{"kind": "train", "step": 3', b' {"step": 3'), [1, 4]),
    "cut": (lambda content: content[: content.index(b'"step": 3')], [1, 2]),
    "empty": (lambda content: b"", []),
}
"""What becomes of a file of four rows, and the rows that are left."""


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_row_costs_no_other(kind: str, tmp_path: Path) -> None:
    """It is told, and what was there is kept beside."""
    damage, left = DAMAGES[kind]
    written(tmp_path / "run", 1, 2, 3, 4).close()
    path = tmp_path / "run" / "metrics.jsonl"
    damaged = damage(path.read_bytes())
    path.write_bytes(damaged)
    said: list[str] = []
    log = written(tmp_path / "run", 5, start=4, said=said)
    log.close()
    assert steps(path) == [*left, 5] and log.count == len(left) + 1
    (text,) = said
    assert f"{4 - len(left)} of the 4 rows up to step 4 are damaged or gone" in text
    written(tmp_path / "run", start=4).close()  # the next start, should that one have come to no checkpoint
    assert (tmp_path / "run" / "metrics.damaged.jsonl").read_bytes() == damaged


def test_a_row_that_a_crash_cut_short_is_no_damage(tmp_path: Path) -> None:
    written(tmp_path / "run", 1, 2, 3).close()
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    said: list[str] = []
    written(tmp_path / "run", 3, start=2, said=said).close()
    assert steps(path) == [1, 2, 3] and said == []
    assert not (tmp_path / "run" / "metrics.damaged.jsonl").exists()
