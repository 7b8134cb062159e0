"""What a person sees of a run: a bar on a terminal, a line at each logging step elsewhere."""

import sys
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn


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
        """Show a train, knn or eval row of the metrics."""
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


class CountProgress:
    """Progress of a count of things, on standard error: a bar on a terminal, a line at each tenth elsewhere.

    Args:
        what: is counted, as in "kNN, images". total: of them. quiet: say nothing (processes other than the main one).
    """

    def __init__(self, what: str, total: int, quiet: bool = False) -> None:
        self._what, self._total, self._done, self._quiet = what, total, 0, quiet
        self._bar: Progress | None = None
        if not quiet and sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task(what, total=total)
            self._bar.start()

    def __enter__(self) -> "CountProgress":
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, count: int) -> None:
        """So many more are done."""
        before, self._done = self._done, self._done + count
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)
        elif not self._quiet and 10 * before // max(1, self._total) < 10 * self._done // max(1, self._total):
            print(f"{self._what}: {self._done}/{self._total}", file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        """Say it above the bar, even when quiet."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)


def _text(row: dict[str, Any]) -> str:
    if row["kind"] == "knn":
        return f"epoch {row['epoch'] + 1}: kNN accuracy {row['accuracy']:.1%}"
    if row["kind"] == "eval":
        return f"epoch {row['epoch'] + 1}: top-1 {row['top1']:.2%} top-5 {row['top5']:.2%} ({row['on']})"
    timing = row["timing"]
    return (
        f"epoch {row['epoch'] + 1} loss {_number(row['loss'], '.3f')} "
        f"acc@1 {_number(row['acc1'], '.1%')} acc@5 {_number(row['acc5'], '.1%')} "
        f"{timing['images_per_second']:.0f} images/s data wait {timing['data_wait']:.0%} "
        f"ETA {timedelta(seconds=round(timing['remaining_seconds']))}"
    )


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)
