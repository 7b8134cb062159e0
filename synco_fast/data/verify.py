"""Decodes every image of a data set as the loader would, in several processes: which are bad, and why."""

import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from synco_fast.data.corrupt import Checked, Checker
from synco_fast.data.samples import Index
from synco_fast.errors import UserError

_CHUNK = 16  # images a worker takes at a time
_EXAMPLES = 3
_FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".tif": "TIFF", ".tiff": "TIFF"}  # others: as the suffix says
_checker: Checker  # of a worker process


@dataclass(frozen=True, eq=False)
class Report:
    """What `verify` found.

    Attributes:
        index: what was looked at.
        faults: sample to why it is bad, in the index's order.
        misnamed: sample to its format, where the file's name says another one. Such files are good.
    """

    index: Index
    faults: dict[int, str]
    misnamed: dict[int, str]

    def good(self) -> Index:
        """The index without the bad ones."""
        return self.index.take([i for i in range(len(self.index)) if i not in self.faults])

    def text(self) -> str:
        """Every bad file under its reason, then counts."""
        reasons = defaultdict(list)
        for sample, reason in self.faults.items():
            reasons[reason].append(self.index.files[sample])
        lines = []
        for reason, files in sorted(reasons.items()):
            lines += [f"{reason}:", *(f"  {file}" for file in files)]
        if self.misnamed:
            some = [f"{self.index.files[i]} is {form}" for i, form in list(self.misnamed.items())[:_EXAMPLES]]
            more = ", ..." if len(self.misnamed) > _EXAMPLES else ""
            lines.append(
                f"{len(self.misnamed)} good files have a wrong suffix, which is no harm: {', '.join(some)}{more}"
            )
        n, bad = len(self.index), len(self.faults)
        lines.append(f"{n} images: {n - bad} good, {bad} bad")
        lines += [
            f"{len(files):>7}  {reason}" for reason, files in sorted(reasons.items(), key=lambda item: -len(item[1]))
        ]
        return "\n".join(lines)


def verify(index: Index, workers: int | None = None) -> Report:
    """Make a small view of every image on the CPU, with a progress bar on a terminal.

    Args:
        index: the images. workers: processes; None: as many as this one may use CPUs.

    Raises:
        UserError: a worker died.
    """
    faults, misnamed = {}, {}
    terminal = sys.stderr.isatty()
    with Progress(console=Console(stderr=True), disable=not terminal) as progress:
        results = _check_all(index, workers or len(os.sched_getaffinity(0)))
        for i, checked in enumerate(progress.track(results, total=len(index), description="decoding")):
            suffix = Path(index.files[i]).suffix.lower()
            if checked.fault is not None:
                faults[i] = checked.fault
            elif checked.format is not None and checked.format != _FORMATS.get(suffix, suffix[1:].upper()):
                misnamed[i] = checked.format
    return Report(index, faults, misnamed)


def _check_all(index: Index, workers: int) -> Iterator[Checked]:
    # DALI and torch have threads, so a process that has loaded them must not be forked.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start, (index,))
    try:
        yield from pool.map(_check, range(len(index)), chunksize=_CHUNK)
    except BrokenProcessPool as error:
        raise UserError(
            "a process that decodes images died, perhaps for lack of memory; try fewer with --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start(index: Index) -> None:
    global _checker
    _checker = Checker(index, torch.device("cpu"))
    # The decoders' libraries write about every bad file there; what is to be known of it is returned.
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.__stderr__.fileno() if sys.__stderr__ else 2)


def _check(sample: int) -> Checked:
    return _checker.check(sample)
