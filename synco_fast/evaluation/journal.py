"""What a run of trainings keeps on disk, shows, and stops and goes on by: as pretraining does."""

import contextlib
from collections.abc import Iterator
from typing import Any

from synco_fast.config_text import listing
from synco_fast.engine import checkpoints
from synco_fast.engine.metrics import MetricsLog
from synco_fast.engine.output import OWNER, claimed
from synco_fast.engine.progress import TrainingProgress
from synco_fast.engine.run import to_go_on_with
from synco_fast.engine.stopping import Stop
from synco_fast.engine.writer import CheckpointWriter, finish
from synco_fast.errors import Interrupted, UserError
from synco_fast.evaluation.session import Session

FILES = ("checkpoints", "metrics.jsonl", "metrics.damaged.jsonl", "tensorboard", OWNER)
"""What a journal leaves in the output folder."""

_ENTRIES = {"command": str, "run": dict, "finished": list, "step": int, "training": dict}


class Journal:
    """Metrics, progress, checkpoints and signals of one run, which is one training or several, one after the other.

    Opened, it makes the output folder and waits for signals; before that nothing is written.

    Args:
        session: the evaluation. settings: of the command, as JSON; with other ones a run is another.
        resume: None to start, "auto" to go on if there is something to go on with, or a checkpoint's path.

    Attributes:
        finished: results of the trainings that are over.
        step: steps done by then, over all trainings. path: of the checkpoint gone on from, or None.

    Raises:
        UserError: the checkpoint is damaged or of another run, or the folder holds a run that would be replaced.
    """

    def __init__(self, session: Session, settings: dict[str, Any], resume: str | None) -> None:
        self.processes, self.output = session.processes, session.request.output
        self.finished: list[dict[str, Any]] = []
        self.step = 0
        self.path, content = to_go_on_with(self.output, resume, "--output DIR")
        self._command, self._run = session.command, _identity(session, settings)
        self._saved: dict[str, Any] | None = None
        self._rows: int | None = None
        if self.path is not None:
            state = self._checked(content)
            self.finished, self.step, self._saved = state["finished"], state["step"], state["training"]
            self._rows = state.get("rows")  # older ones do not say
        self._stop = Stop(session.processes)
        self._metrics: MetricsLog | None = None
        self._writer: CheckpointWriter | None = None
        self._progress: TrainingProgress | None = None
        self._total = 0

    def take(self) -> dict[str, Any] | None:
        """The state of the training that was under way, once: the next training is a new one."""
        state, self._saved = self._saved, None
        return state

    @contextlib.contextmanager
    def opened(self, total: int) -> Iterator[None]:
        """At work, with `total` steps over all trainings. All processes enter and leave it.

        Raises:
            UserError: the output folder cannot be used, or the last checkpoint could not be written.
        """
        self._total = total
        self._progress = TrainingProgress(total, self.step, quiet=not self.processes.is_main)
        try:
            self._claim = claimed(self.output, self.processes, f"--output {self.output}", self._begin)
            if self._metrics is not None:
                self._writer = CheckpointWriter(
                    checkpoints.folder(self.output),
                    recent=2,
                    hours=0,
                    before=(self._claim.check, self._metrics.sync),
                    warn=self._progress.warn,
                )
            with self._stop:
                if self.step >= total:
                    self._progress.say(f"nothing to do: step {self.step} of {total} is done")
                try:
                    yield
                except Interrupted:
                    finish(self._writer, self.processes)
                    self._stop.tell_launcher()
                    raise
                finish(self._writer, self.processes)
        finally:
            self._close()

    def _begin(self) -> None:
        assert self._progress is not None
        self._metrics = MetricsLog(self.output, self.step, self._rows, self._progress.warn)

    def _close(self) -> None:
        assert self._progress is not None
        self._progress.close()
        if self._writer is not None:
            self._writer.wait()
        if self._metrics is not None:
            self._metrics.close()

    def advance(self, step: int) -> None:
        """So many steps are done."""
        self.step = step
        assert self._progress is not None
        self._progress.advance(step)

    def remaining(self) -> int:
        """Steps to do, over all trainings."""
        return self._total - self.step

    def report(self, row: dict[str, Any]) -> None:
        """Show and write a row of the metrics."""
        assert self._progress is not None
        self._progress.report(row)
        if self._metrics is not None:
            self._metrics.write(row)

    def warn(self, text: str) -> None:
        """Say what only this process knows."""
        assert self._progress is not None
        self._progress.warn(text)

    def save(self, training: dict[str, Any]) -> None:
        """Begin to write a checkpoint; all processes call it, the main one writes.

        Raises:
            UserError: another run has taken the folder.
        """
        self._claim.check_all()
        if self._metrics is not None and self._writer is not None:
            state = {
                "command": self._command,
                "run": self._run,
                "finished": self.finished,
                "step": self.step,
                "rows": self._metrics.count,
                "training": training,
            }
            self._writer.save(state, keep_as_epoch=None)

    def interrupted(self, agree: bool) -> bool:
        """Whether to stop here, see `Stop.came`."""
        return self._stop.came(agree)

    def _checked(self, state: dict[str, Any]) -> dict[str, Any]:
        wrong = [name for name, kind in _ENTRIES.items() if not isinstance(state.get(name), kind)]
        if wrong or state["command"] != self._command:
            what = f"it lacks {', '.join(wrong)}" if wrong else f"it is one of {state['command']}"
            raise UserError(f"{self.path}: not a checkpoint of synco-fast {self._command}: {what}")
        changed = [
            f"{name} is {now!r}, was {state['run'].get(name)!r}"
            for name, now in self._run.items()
            if state["run"].get(name) != now
        ]
        if changed:
            raise listing(f"{self.path}: cannot resume, this is another run (start it in another --output)", changed)
        return state


def _identity(session: Session, settings: dict[str, Any]) -> dict[str, Any]:
    data = session.data
    return settings | {
        "precision": session.request.precision,
        "weights": session.weights.about["sha256"],
        "training images": session.bank.digest,
        "held-out images": session.held_out.digest,
        **{f"data.{name}": getattr(data, name) for name in ("image_size", "eval_resize", "dtype")},
    }
