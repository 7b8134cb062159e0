"""What survives a sweep that is killed: which stages of each run are finished, and who is at work in its folder."""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from synco_fast.config import Config
from synco_fast.config_text import flatten, listing
from synco_fast.data.index import Index
from synco_fast.errors import UserError
from synco_fast.evaluation.sweep import (
    CHILDREN_LOCK,
    FILES,
    LOG,
    OWN_LOCK,
    PRETRAIN,
    STATE,
    Plan,
    Run,
    differences,
    recorded,
)
from synco_fast.files import write_text_atomically

_PATIENCE = 0.2  # seconds between two looks at a lock


class Record:
    """What is finished of a run, as `stages.json` in its folder says.

    Attributes:
        run: of the sweep. folder: of the run. data: identity of the images.
        held_out: that of the held-out ones; None where no evaluation needs them.
        finished: by stage, `seconds` of the process that finished it and what it was told: `config` and `data` of the
            pretraining, `options` and `held_out` of an evaluation, with the `metrics` that it found.
    """

    def __init__(self, run: Run, output: Path, data: dict[str, Any], held_out: dict[str, Any] | None) -> None:
        self.run, self.folder, self.data, self.held_out = run, run.folder(output), data, held_out
        self.path = self.folder / STATE
        self.finished: dict[str, dict[str, Any]] = self._read() if self.path.exists() else {}

    def finish(self, stage: str, seconds: float, **details: Any) -> None:
        """Write down that a stage is finished: it is never done again."""
        if stage == PRETRAIN:
            details = {"config": recorded(self.run.config), "data": self.data}
        else:
            details["held_out"] = self.held_out
        self.finished[stage] = {"seconds": round(seconds, 3), **details}
        write_text_atomically(self.path, json.dumps(self.finished, indent=1))

    def changes(self, evaluations: dict[str, dict[str, Any]]) -> list[str]:
        """How what is finished differs from what is asked for now."""
        found = []
        if PRETRAIN in self.finished:
            done = self.finished[PRETRAIN]
            # A key that is newer than the record was at its default.
            before = flatten(recorded(Config())) | flatten(done["config"])
            found += differences(before, recorded(self.run.config)) + differences(
                {"data": done["data"]}, {"data": self.data}
            )
        for name, options in evaluations.items():
            if name in self.finished:
                done = self.finished[name]
                found += differences({name: done["options"]}, {name: options}) + differences(
                    {f"{name}: held-out data": done["held_out"]}, {f"{name}: held-out data": self.held_out}
                )
        return [f"{self.run}: {change}" for change in found]

    def _read(self) -> dict[str, dict[str, Any]]:
        keys = {PRETRAIN: ("seconds", "config", "data")}
        try:
            finished = json.loads(self.path.read_text(encoding="utf-8"))
            for stage, entry in finished.items():
                for key in keys.get(stage, ("seconds", "options", "held_out", "metrics")):
                    _ = entry[key]
        except (ValueError, AttributeError, LookupError, TypeError) as error:
            raise UserError(
                f"{self.path}: not what a sweep wrote: {error!r}; delete the folder {self.folder} to have it run anew"
            ) from error
        return finished


def read_records(plan: Plan, output: Path, data: Index, held_out: Index | None) -> list[Record]:
    """The record of each of a plan's runs.

    Raises:
        UserError: a run was finished with other settings or images than it has now; or a record cannot be read.
    """
    others = None if held_out is None else _identity(held_out)
    records = [Record(run, output, _identity(data), others) for run in plan.runs]
    changes = [change for record in records for change in record.changes(plan.evaluations)]
    if changes:
        raise listing(
            f"{plan.source}: {output} holds runs that were finished with other settings or images; name another "
            "--output, or delete the folder of a run to have it run anew",
            changes,
        )
    return records


def _identity(index: Index) -> dict[str, Any]:
    return {"images": len(index), "digest": index.digest}


def names_in(output: Path, plan: Plan) -> set[str]:
    """What a sweep may find in its output folder: its files, its runs, and runs that its file no longer names."""
    there = output.iterdir() if output.is_dir() else ()
    return {*FILES, *(run.name for run in plan.runs)} | {path.name for path in there if any(path.glob(f"seed-*/{LOG}"))}


@contextlib.contextmanager
def alone(output: Path, say: Callable[[str], object]) -> Iterator[int]:
    """Hold an output folder against other sweeps.

    The kernel gives up a lock with the last process that has the file open. The one of the children is for them to
    inherit: it outlasts a sweep that was killed until the last of its children has ended, and the next sweep waits.

    Args:
        say: is told that there is something to wait for.

    Yields:
        The descriptor that children are to inherit.

    Raises:
        UserError: another sweep is at work there.
    """
    with (output / OWN_LOCK).open("a+") as own:
        if not _take(own):
            own.seek(0)
            raise UserError(
                f"--output {output}: another sweep is at work there, process {own.read().strip() or 'unknown'}; wait "
                "for its end, or name another folder"
            )
        own.truncate(0)
        own.write(f"{os.getpid()}\n")
        own.flush()
        with (output / CHILDREN_LOCK).open("a") as children:
            if not _take(children):
                say(f"waiting for what a sweep that was killed left running in {output}")
            while not _take(children):
                time.sleep(_PATIENCE)
            yield children.fileno()


def _take(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
