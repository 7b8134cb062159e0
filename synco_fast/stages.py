"""Named stages of a training step, for whoever wants to time them. Where nobody does, they cost next to nothing."""

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol

STAGES = (
    "momentum update",
    "query forward",
    "key forward",
    "op",
    "backward",
    "metrics",
    "optimizer",
    "enqueue",
    "gather",
)
"""In the order in which a step meets them. `gather` lies within others: a recorder takes it out of theirs."""


class Recorder(Protocol):
    """Told where each stage begins and ends. Stages may nest."""

    def stage(self, name: str) -> AbstractContextManager[None]: ...


_recorder: Recorder | None = None


def stage(name: str) -> AbstractContextManager[None]:
    """What happens within is stage `name`, one of STAGES."""
    return contextlib.nullcontext() if _recorder is None else _recorder.stage(name)


@contextlib.contextmanager
def recorded(recorder: Recorder) -> Iterator[None]:
    """Have a recorder told of the stages within."""
    global _recorder
    if _recorder is not None:
        raise RuntimeError("stages are being recorded already")
    _recorder = recorder
    try:
        yield
    finally:
        _recorder = None
