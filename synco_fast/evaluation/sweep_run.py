"""`synco-fast sweep`: each stage of each run is a process of its own, and what is finished is never done again."""

import contextlib
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from synco_fast.config_text import listing
from synco_fast.data.index import scan
from synco_fast.engine import checkpoints
from synco_fast.engine.distributed import Processes, choose_device
from synco_fast.engine.metrics import check_place
from synco_fast.engine.probe import held_out_like
from synco_fast.engine.progress import CountProgress
from synco_fast.engine.run import check
from synco_fast.errors import EXIT_INTERRUPTED, Interrupted, UserError
from synco_fast.evaluation import sweep_page
from synco_fast.evaluation.session import RESULT
from synco_fast.evaluation.sweep import ASKED, LOG, PRETRAIN, TABLE, Plan, read_plan
from synco_fast.evaluation.sweep_options import Evaluation
from synco_fast.evaluation.sweep_state import Record, alone, names_in, read_records
from synco_fast.files import check_folder, make_folder, write_text_atomically

_TAIL = 6  # lines of a failed stage's log that are shown
_PATIENCE = 0.05  # seconds between two looks at the children

# The kernel sends SIGTERM to a child whose sweep has died, however that was: a pretraining then writes a checkpoint and
# ends. It must be asked to by the child itself, and the sweep may have died before that.
_CHILD = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.executable, [sys.executable, "-m", "synco_fast", *sys.argv[2:]])
"""


def run(path: Path, data: Path, output: Path, jobs: int | None, commands: Mapping[str, Evaluation]) -> str:
    """Run (or go on with) a sweep, and leave its results in `output`.

    Args:
        path: the sweep's file. data: the images. output: folder of all its runs.
        jobs: processes at a time; None: as many as there are GPUs, or one. commands: see `read_plan`.

    Returns:
        The table of results.

    Raises:
        UserError: something cannot work, and nothing was started; or runs failed, after all others were finished.
        Interrupted: by SIGTERM or SIGINT, after every process at work has ended; the same call goes on.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("sweep: under torchrun, each of its processes would run the sweep; start it without")
    started, plan = time.time(), read_plan(path, commands)
    _check_runs(plan)
    index = scan(data)
    held_out = held_out_like(index, data, "sweep") if plan.evaluations else None
    check_place(output)
    check_folder(output, names_in(output, plan), "sweep")
    make_folder(output)
    with (
        CountProgress("sweep, stages", len(plan.runs) * len(plan.stages)) as progress,
        alone(output, progress.warn) as lock,
    ):
        records = read_records(plan, output, index, held_out)
        work = _Work(plan, records, data, output, lock, progress, started)
        work.run(jobs or max(1, torch.cuda.device_count()))
    return (output / TABLE).read_text(encoding="utf-8")


def devices() -> list[str]:
    """The GPUs that this process sees, as CUDA_VISIBLE_DEVICES names them."""
    count, given = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return (given.split(",") if given else [str(number) for number in range(count)])[:count]


class _Child:
    """The process of a stage, at work.

    Args:
        record: of its run. stage: name. words: of the command line. environment: of the process, beside this one's.
        lock: the descriptor to inherit.
    """

    def __init__(self, record: Record, stage: str, words: list[str], environment: dict[str, str], lock: int) -> None:
        self.record, self.stage, self.started = record, stage, time.monotonic()
        self._asked = False
        with (record.folder / LOG).open("ab") as log:
            log.write(f"$ {shlex.join(['synco-fast', *words])}\n".encode(errors="surrogateescape"))
            log.flush()
            # In a session of its own, a terminal's Ctrl-C reaches it through the sweep alone.
            self.process = subprocess.Popen(
                [sys.executable, "-c", _CHILD, str(os.getpid()), *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                pass_fds=[lock],
                start_new_session=True,
            )

    def stop(self) -> None:
        """Ask it to end: a pretraining finishes its step and writes a checkpoint."""
        if not self._asked:
            self.process.terminate()
        self._asked = True

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def __str__(self) -> str:
        return f"{self.record.run}: {self.stage}"


class _Work:
    """A sweep at work: what waits, what runs, and what became of it."""

    def __init__(
        self,
        plan: Plan,
        records: list[Record],
        data: Path,
        output: Path,
        lock: int,
        progress: CountProgress,
        started: float,
    ) -> None:
        self.plan, self.records, self.data, self.output = plan, records, data, output
        self.lock, self.progress, self.started = lock, progress, started
        self.devices = devices()
        self.children: dict[int, _Child] = {}  # by slot
        self.failed: list[str] = []
        self.interrupted = False  # by a signal to the sweep, or to a child by somebody else
        self.stopping = False

    def run(self, jobs: int) -> None:
        """All stages that are left, `jobs` at a time; each seed's runs before the next seed's."""
        self.progress.advance(self._done())
        seeds = list(dict.fromkeys(record.run.seed for record in self.records))
        waiting = deque(
            sorted((r for r in self.records if self._next(r)), key=lambda record: seeds.index(record.run.seed))
        )
        with self._signals(), self._no_orphans():
            while self.children or (waiting and not self.stopping):
                for slot in range(jobs):
                    if waiting and slot not in self.children and not self.stopping:
                        self._start(waiting.popleft(), slot)
                time.sleep(_PATIENCE)
                for slot, child in list(self.children.items()):
                    if self.stopping:
                        child.stop()
                    if child.process.poll() is not None:
                        del self.children[slot]
                        self._ended(child, slot)
        self._write()
        self._conclude()

    def _next(self, record: Record) -> str | None:
        return next((stage for stage in self.plan.stages if stage not in record.finished), None)

    def _done(self) -> int:
        return sum(stage in record.finished for record in self.records for stage in self.plan.stages)

    def _start(self, record: Record, slot: int) -> None:
        stage = self._next(record)
        assert stage is not None
        make_folder(record.folder)
        words = self._words(record, stage)
        environment = {"CUDA_VISIBLE_DEVICES": self.devices[slot % len(self.devices)]} if self.devices else {}
        self.children[slot] = _Child(record, stage, words, environment, self.lock)
        self.progress.warn(f"{self.children[slot]} begins ({record.folder / LOG})")

    def _words(self, record: Record, stage: str) -> list[str]:
        """The command line of a stage."""
        folder = record.folder
        if stage != PRETRAIN:
            checkpoint = checkpoints.folder(folder) / checkpoints.LATEST
            places = ["--data", str(self.data), "--output", str(folder / stage)]
            command, *options = self.plan.words[stage]
            return [command, str(checkpoint), *places, *options]
        config = record.run.config
        placed = {"output": str(folder), "data": config.data.model_copy(update={"root": str(self.data)})}
        file = folder / ASKED  # of what it trains under, once it has checked that it can, it writes config.yaml
        write_text_atomically(file, config.model_copy(update=placed).to_yaml())
        return [PRETRAIN, str(file), "--resume", "auto"]

    def _ended(self, child: _Child, slot: int) -> None:
        code, record = child.process.returncode, child.record
        if code == 0:
            try:
                record.finish(child.stage, child.seconds, **self._found(child))
            except UserError as error:
                return self._fail(child, str(error))
            self.progress.advance(1)
            self.progress.warn(f"{child} is done in {child.seconds:.0f} s")
            if self._next(record) is None:
                self._write()
            elif not self.stopping:
                self._start(record, slot)
        elif self.stopping or code == EXIT_INTERRUPTED:
            self.interrupted = True
            self.progress.warn(f"{child} was stopped; the same command goes on with it")
        else:
            reason = f"exit code {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"
            self._fail(child, "\n  ".join([reason, *_tail(record.folder / LOG)]))
        return None

    def _found(self, child: _Child) -> dict[str, Any]:
        """What a finished evaluation leaves for the table."""
        if child.stage == PRETRAIN:
            return {}
        path = child.record.folder / child.stage / RESULT
        try:
            metrics = json.loads(path.read_text(encoding="utf-8"))["metrics"]
            if not all(type(value) in (int, float) and math.isfinite(value) for value in metrics.values()):
                raise ValueError("a metric is not a finite number")
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: no result with metrics: {error}") from error
        return {"options": self.plan.evaluations[child.stage], "metrics": metrics}

    def _fail(self, child: _Child, reason: str) -> None:
        self.failed.append(f"{child} ({child.record.folder / LOG})")
        self.progress.warn(f"{child} failed: {reason}")

    def _stages(self) -> dict[str, int]:
        return {"done": self._done(), "of": len(self.records) * len(self.plan.stages)}

    def _write(self) -> None:
        sweep_page.write_results(self.plan, self.records, self.output, self._stages(), self.started)

    def _conclude(self) -> None:
        done, total = self._stages().values()
        if (self.interrupted or self.stopping) and done < total:
            raise Interrupted(f"stopped by a signal: {done} of {total} stages are done; the same command goes on")
        if self.failed:
            many = f"{len(self.failed)} of {len(self.records)} runs failed"
            raise listing(f"{many}; the same command tries them again, and keeps what is finished:", self.failed)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """At SIGTERM and SIGINT, nothing more is started, and the children are asked to stop."""

        def stop(number: int, frame: Any) -> None:
            self.stopping = True

        handlers = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def _no_orphans(self) -> Iterator[None]:
        """Whatever ends the sweep early, as a full disk does, ends its children first."""
        try:
            yield
        finally:
            for child in self.children.values():
                child.stop()
            for child in self.children.values():
                child.process.wait()


def _check_runs(plan: Plan) -> None:
    """Refuse what cannot work on this machine, data aside.

    Raises:
        UserError: listing it by the names of runs.
    """
    problems: dict[str, None] = {}
    for item in plan.runs:
        try:
            check(item.config, Processes(0, 1, choose_device(item.config.trainer.device)))
        except UserError as error:
            problems |= {f"{item.name}: {line.strip()}": None for line in str(error).splitlines()}
    if problems:
        raise listing(f"{plan.source}: the sweep cannot be run here", list(problems))


def _tail(path: Path) -> list[str]:
    """The last lines of a log, each of them short."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 2**14))
        lines = file.read().decode(errors="replace").splitlines()
    return [line[:200] for line in lines[-_TAIL:]]
