"""Writing checkpoints beside training: each is whole or absent, and one that cannot be written costs no other."""

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from synco_fast.engine import checkpoints
from synco_fast.engine.distributed import Processes
from synco_fast.engine.stopping import agreed
from synco_fast.errors import UserError
from synco_fast.files import link, symlink


class CheckpointWriter:
    """Writes `step-N.pt` in a thread, points `latest.pt` to it, and lets old ones go.

    A state is copied to the host before `save` returns, so training goes on at once and may change it. One is written
    at a time: the next waits for it. What cannot be written is told, and the run goes on with the last good one.

    Args:
        folder: of the checkpoints. recent: how many of the newest stay. hours: younger ones stay, too.
        before: called one after another before a file is written: what it stands for must be on disk by then.
        warn: told what could not be written.
    """

    def __init__(
        self,
        folder: Path,
        *,
        recent: int,
        hours: float,
        before: Sequence[Callable[[], object]],
        warn: Callable[[str], object],
    ) -> None:
        self._folder, self._recent, self._hours, self._before, self._warn = folder, recent, hours, before, warn
        self._thread: threading.Thread | None = None
        self._failed: UserError | None = None
        for stray in folder.glob(".*.tmp"):  # of a process that was killed while it wrote
            with contextlib.suppress(OSError):
                stray.unlink()

    def save(self, state: dict[str, Any], *, keep_as_epoch: int | None) -> None:
        """Write a state beside whatever comes next; with `keep_as_epoch`, for good under that epoch's name, too."""
        self.wait()
        state = on_host(state)
        ready = torch.cuda.Event() if torch.cuda.is_initialized() else None
        if ready is not None:
            ready.record()
        # Not a daemon: an interpreter that ends waits for it.
        self._thread = threading.Thread(target=self._write, args=(state, keep_as_epoch, ready), name="checkpoint")
        self._thread.start()

    def finish(self) -> UserError | None:
        """Wait until the last one is written; the error if it could not be."""
        self.wait()
        return self._failed

    def wait(self) -> None:
        """Until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
        self._thread = None

    def _write(self, state: dict[str, Any], keep_as_epoch: int | None, ready: torch.cuda.Event | None) -> None:
        try:
            if ready is not None:
                ready.synchronize()
            for call in self._before:
                call()
            path = self._folder / checkpoints.step_name(state["step"])
            checkpoints.write(path, state)
            if keep_as_epoch is not None:
                link(path, self._folder / checkpoints.epoch_name(keep_as_epoch))
            symlink(path.name, self._folder / checkpoints.LATEST)
            self._failed = None
            with contextlib.suppress(OSError):  # another time, then
                self._let_go(state["step"])
        except Exception as error:  # of a thread, nobody else would hear
            self._failed = error if isinstance(error, UserError) else UserError(f"a checkpoint failed: {error!r}")
            self._warn(f"warning: {self._failed}; the run goes on, and its last good checkpoint stays")

    def _let_go(self, step: int) -> None:
        """Remove all but the newest up to this step. Those beyond it are of a run that went on from before them."""
        mine = {found: path for path in self._folder.iterdir() if (found := checkpoints.step_of(path)) is not None}
        old = sorted((number for number in mine if number <= step), reverse=True)[self._recent :]
        for number in old:
            if time.time() - mine[number].stat().st_mtime > 3600 * self._hours:
                mine[number].unlink()


def finish(writer: CheckpointWriter | None, processes: Processes) -> None:
    """Wait until the last checkpoint is written; all processes call it, the main one with its writer.

    Raises:
        UserError: on all of them: it could not be.
    """
    error = None if writer is None else writer.finish()
    if agreed(processes, True, error is not None)[0]:
        raise error or UserError("the last checkpoint could not be written; rank 0 says why")


def on_host(value: Any) -> Any:
    """A copy of nested values whose tensors are on the host; from a GPU it is on its way there when this returns."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", non_blocking=True, copy=True)
    if isinstance(value, dict):
        return {key: on_host(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(on_host, value))
    return value
