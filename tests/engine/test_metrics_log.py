"""metrics.jsonl: no row is lost to a disk that fails, and a damaged one costs no other."""

import errno
import os
from pathlib import Path

import pytest

from synco_fast.engine.metrics import MetricsLog
from synco_fast.errors import UserError
from synco_fast.files import read_json_lines


def steps(path: Path) -> list[int]:
    return [row["step"] for row in read_json_lines(path)]


def written(folder: Path, *numbers: int, start: int = 0, said: list[str] | None = None) -> MetricsLog:
    """A log with rows of these steps, not closed yet."""
    folder.mkdir(exist_ok=True)
    log = MetricsLog(folder, start, ([] if said is None else said).append)
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


@pytest.mark.parametrize("damage", [b"\xff", b"}", b"\n", b" "])
def test_a_damaged_row_costs_no_other(damage: bytes, tmp_path: Path) -> None:
    """Within a row, or in place of the end of one, which costs both rows; what was there is kept beside."""
    written(tmp_path / "run", 1, 2, 3, 4).close()
    path = tmp_path / "run" / "metrics.jsonl"
    content = path.read_bytes()
    end = content.index(b"\n", content.index(b'"step": 2'))
    place = end if damage == b" " else content.index(b'"step": 2') + 3
    damaged = content[:place] + damage + content[place + 1 :]
    path.write_bytes(damaged)
    said: list[str] = []
    written(tmp_path / "run", 5, start=4, said=said).close()
    left = [1, 4, 5] if damage == b" " else [1, 3, 4, 5]
    assert steps(path) == left
    (text,) = said
    assert f"{2 if damage == chr(10).encode() else 1} damaged lines are left out" in text
    assert (tmp_path / "run" / "metrics.damaged.jsonl").read_bytes() == damaged


def test_a_last_row_cut_short_is_no_damage(tmp_path: Path) -> None:
    written(tmp_path / "run", 1, 2, 3).close()
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    said: list[str] = []
    written(tmp_path / "run", 3, start=2, said=said).close()
    assert steps(path) == [1, 2, 3] and said == []
    assert not (tmp_path / "run" / "metrics.damaged.jsonl").exists()
