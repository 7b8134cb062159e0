"""What a person sees of a run: a bar on a terminal, a line at each logging step elsewhere."""

import sys
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn


class TrainingProgress:
    """Progress of the steps of a run, on standard error.

    Args:
        total: steps in all. done: steps already done. quiet: say nothing (processes other than the main one).
    """

    def __init__(self, total: int, done: int, quiet: bool) -> None:
        self._total = total
        self._quiet = quiet
        self._bar: Progress | None = None
        if not quiet and sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
            self._bar = Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True))
            self._task = self._bar.add_task("starting", total=total, completed=done)
            self._bar.start()

    def advance(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def report(self, row: dict[str, Any]) -> None:
        """Show a train or knn row of the metrics."""
        text = _text(row)
        if self._bar is None:
            self.say(f"step {row['step']}/{self._total} {text}")
        elif row["kind"] == "train":
            self._bar.update(self._task, description=text)
        else:
            self.say(text)

    def say(self, text: str) -> None:
        if not self._quiet:
            self.warn(text)

    def warn(self, text: str) -> None:
        """Say it even when quiet: what only this process knows."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def _text(row: dict[str, Any]) -> str:
    if row["kind"] == "knn":
        return f"epoch {row['epoch'] + 1}: kNN accuracy {row['accuracy']:.1%}"
    timing = row["timing"]
    return (
        f"epoch {row['epoch'] + 1} loss {_number(row['loss'], '.3f')} "
        f"acc@1 {_number(row['acc1'], '.1%')} acc@5 {_number(row['acc5'], '.1%')} "
        f"{timing['images_per_second']:.0f} images/s data wait {timing['data_wait']:.0%} "
        f"ETA {timedelta(seconds=round(timing['remaining_seconds']))}"
    )


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)
