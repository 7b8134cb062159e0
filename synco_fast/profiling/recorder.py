"""Recorders of the stages of a step: one takes their times, one names them in a trace."""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch


class StepTimes(NamedTuple):
    """One step in nanoseconds.

    Attributes:
        wall: from its beginning to its end. stages: own time of each stage that occurred, what lies within it left out.
    """

    wall: int
    stages: dict[str, int]

    @property
    def unattributed(self) -> int:
        """What no stage claims."""
        return self.wall - sum(self.stages.values())


class _Mark(NamedTuple):
    """A boundary: whose time ends here (None: nobody's), on the host's clock and, if there is one, in the stream."""

    owner: str | None
    host: int
    event: Any


class StageRecorder:
    """Takes the time of each stage of each step: of a nested stage's time, the outer one gets nothing.

    On CUDA an event stands in the stream beside each reading of the host's clock, which waits for nothing; NVTX ranges
    of the stages' names show up in Nsight Systems.

    Args:
        device: whose work is timed. now: the host's clock, nanoseconds.
    """

    def __init__(self, device: torch.device, now: Callable[[], int] = time.perf_counter_ns) -> None:
        self._cuda = device.type == "cuda"
        self._now = now
        self._open: list[str] = []
        self._steps: list[list[_Mark]] = []

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """What happens within is one step."""
        self._steps.append([])
        self._mark()
        yield
        self._mark()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._mark()
        self._open.append(name)
        if self._cuda:
            torch.cuda.nvtx.range_push(name)
        try:
            yield
        finally:
            if self._cuda:
                torch.cuda.nvtx.range_pop()
            self._mark()
            self._open.pop()

    def _mark(self) -> None:
        event = None
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        self._steps[-1].append(_Mark(self._open[-1] if self._open else None, self._now(), event))

    def host(self) -> list[StepTimes]:
        """The steps by the host's clock: on a CPU the work, on CUDA the time it took to launch it."""
        return [_times(marks, lambda before, after: after.host - before.host) for marks in self._steps]

    def device(self) -> list[StepTimes]:
        """The steps by the device's clock, which on a CPU is the host's. Waits for the device once."""
        if not self._cuda:
            return self.host()
        torch.cuda.synchronize()
        return [
            _times(marks, lambda before, after: round(1e6 * before.event.elapsed_time(after.event)))
            for marks in self._steps
        ]


def _times(marks: list[_Mark], elapsed: Callable[[_Mark, _Mark], int]) -> StepTimes:
    wall, stages = 0, dict[str, int]()
    for before, after in itertools.pairwise(marks):
        interval = elapsed(before, after)
        wall += interval
        if after.owner is not None:
            stages[after.owner] = stages.get(after.owner, 0) + interval
    return StepTimes(wall, stages)


class RangeRecorder:
    """Stages as ranges of their names in a trace of torch.profiler."""

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        with torch.profiler.record_function(name):
            yield
