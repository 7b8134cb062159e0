"""Metrics: summed on the device, read at logging steps, written as JSON lines and for TensorBoard."""

import contextlib
import json
import math
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from synco_fast.engine.distributed import reduce_mean
from synco_fast.errors import UserError
from synco_fast.files import read_json_lines, write_atomically, write_text_atomically
from synco_fast.ops import HardNegatives, InfoNCE, stat_names


class Means:
    """Means over the steps since the last reading, kept on the device.

    Args:
        names: of what each step gives. device: where it is.

    Attributes:
        sums: (len(names),) over those steps, of this process.
    """

    def __init__(self, names: tuple[str, ...], device: torch.device) -> None:
        self.names = names
        self.sums = torch.zeros(len(names), device=device)
        self._steps = torch.zeros((), device=device)  # there, as a CUDA graph runs no Python

    def add(self, values: Tensor, skip: Tensor | None = None) -> None:
        """Add a step's metrics; where skip (scalar) is 1, the step does not count."""
        counts = torch.ones_like(self._steps) if skip is None else 1 - skip
        self.sums += torch.where(counts > 0, values, 0.0)
        self._steps += counts

    def read(self) -> dict[str, float | None]:
        """The means over all processes since the last call. Waits for the device."""
        means = reduce_mean(self.sums / self._steps).tolist()
        self.sums.zero_()
        self._steps.zero_()
        return named(self.names, means)

    def state_dict(self) -> dict[str, Any]:
        """The mean over the processes of their sums; all of them call it, and all of them load it."""
        return {"sums": reduce_mean(self.sums).clone(), "steps": int(self._steps)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums.copy_(state["sums"])
        self._steps.fill_(state["steps"])


class Meter(Means):
    """The means of pretraining's metrics.

    Attributes:
        names: loss, gradient_norm and the op's statistics; those that a step without synthetic negatives lacks are 0
            (masses and shares, truly) or NaN (the hard set's similarity).
    """

    def __init__(self, hard: HardNegatives, device: torch.device) -> None:
        super().__init__(("loss", "gradient_norm", *stat_names(hard)), device)
        self._missing = {
            name: torch.tensor(math.nan if name == "hard_similarity" else 0.0, device=device) for name in self.names
        }

    def values(self, results: list[InfoNCE], gradient_norm: Tensor) -> Tensor:
        """One step's metrics (len(names),), the mean over its micro-batches."""
        rows = [
            torch.stack(
                [
                    result.loss.detach().float(),
                    gradient_norm,
                    *(result.stats.get(name, self._missing[name]) for name in self.names[2:]),
                ]
            )
            for result in results
        ]
        return torch.stack(rows).mean(dim=0)


def named(names: tuple[str, ...], values: list[float]) -> dict[str, float | None]:
    """Values by name; what is not finite becomes None, which JSON can say."""
    return {name: value if math.isfinite(value) else None for name, value in zip(names, values, strict=True)}


def check_place(folder: Path) -> None:
    """Refuse a folder that metrics cannot be written to for its name.

    Raises:
        UserError: naming it.
    """
    try:
        str(folder).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{folder}: TensorBoard writes to folders of names in UTF-8 only; name another output"
        ) from error


class MetricsLog:
    """`metrics.jsonl`, one row at a time, and TensorBoard's event files.

    Every row has `kind` (train, knn or eval), `step` (steps done) and `epoch`. Timings stand in a field of their own,
    `timing`: all else is the same in a run that was interrupted and resumed.

    Args:
        folder: of the run.
        step: rows beyond it belong to work that will be done again, and are dropped.
        rows: how many there were up to it, as the checkpoint says; None: it does not.
        warn: told what is damaged there, and what cannot be written later.

    Attributes:
        count: rows in the file, or on their way to it.

    Raises:
        UserError: they cannot be written there.
    """

    def __init__(self, folder: Path, step: int, rows: int | None, warn: Callable[[str], object]) -> None:
        check_place(folder)
        self.path = folder / "metrics.jsonl"
        self._warn = warn
        kept = self._read(step, rows)
        self.count = len(kept)
        write_text_atomically(self.path, "".join(kept))
        self._safe = self.path.stat().st_size  # bytes that are on disk
        self._rows = b""  # what comes after them
        self._written = 0  # bytes of it that the system has taken
        self._lock = threading.Lock()
        try:
            self._file = self.path.open("r+b", buffering=0)
            self._board: SummaryWriter | None = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        except OSError as error:
            raise UserError(f"{folder}: cannot write metrics there: {error.strerror}") from error

    def write(self, row: dict[str, Any]) -> None:
        """Add a row. What cannot be written waits for the next, and no checkpoint is written before it."""
        with self._lock:
            waiting = self._written < len(self._rows)
            self._rows += _line(row).encode()
            self.count += 1
            try:
                self._drain()
            except OSError as error:
                if not waiting:
                    self._warn(f"warning: {self.path}: cannot write it: {error.strerror}; its rows wait in memory")
        self._draw(row)

    def sync(self) -> None:
        """Have what was written on disk: a checkpoint stands for the rows before it.

        Raises:
            UserError: they cannot be written.
        """
        try:
            with self._lock:
                self._drain()
                size = len(self._rows)
            os.fsync(self._file.fileno())
        except OSError as error:
            with self._lock:
                self._written = 0  # a system forgets what a disk has not taken, and says so once
            raise UserError(f"{self.path}: cannot write it: {error.strerror}") from error
        with self._lock:
            self._rows, self._safe, self._written = self._rows[size:], self._safe + size, self._written - size

    def close(self) -> None:
        self._file.close()
        with contextlib.suppress(OSError):
            if self._board is not None:
                self._board.close()

    def _read(self, step: int, rows: int | None) -> list[str]:
        """The lines of an earlier start, up to a step; if they are not all there, the file is kept as it was, too."""
        if not self.path.exists():
            return []
        kept = []
        for row in read_json_lines(self.path):
            if isinstance(row.get("step"), int) and row["step"] <= step and "kind" in row:
                with contextlib.suppress(ValueError):  # a number that damage has made infinite
                    kept.append(_line(row))
        if rows is not None and len(kept) < rows:
            copy, content = self.path.with_suffix(".damaged.jsonl"), self.path.read_bytes()
            if not copy.exists():  # or an earlier start that came to no checkpoint has put it there
                write_atomically(copy, lambda file: file.write(content))
            lost = f"{rows - len(kept)} of the {rows} rows up to step {step}"
            self._warn(f"warning: {self.path}: {lost} are damaged or gone; {copy} is the file as it was")
        return kept

    def _drain(self) -> None:
        while self._written < len(self._rows):
            rest, place = self._rows[self._written :], self._safe + self._written
            self._written += os.pwrite(self._file.fileno(), rest, place)

    def _draw(self, row: dict[str, Any]) -> None:
        """For TensorBoard, which is done without once it cannot be written: metrics.jsonl has it all."""
        if self._board is None:
            return
        try:
            for name, value in {**row, **row.get("timing", {})}.items():
                if isinstance(value, (int, float)) and name != "step":
                    self._board.add_scalar(f"{row['kind']}/{name}", value, row["step"])
        except OSError as error:
            self._warn(f"warning: tensorboard/: cannot be written: {error.strerror}; it is left as it is from here on")
            self._board = None


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"
