"""Stopping when asked to: by SIGTERM or SIGINT, at the end of a step."""

import signal
from types import TracebackType
from typing import Any

import torch

from synco_fast.engine.distributed import Processes, reduce_max


class StopSignal:
    """Entered, it notes SIGTERM and SIGINT in place of what they did before.

    Args:
        processes: of the run, which must stop at the same step.
    """

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._number: int | None = None

    def __enter__(self) -> "StopSignal":
        self._handlers = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def came(self, agree: bool) -> bool:
        """Whether to stop here. All processes call it; on GPUs several look only to agree, which takes a wait."""
        if self._processes.world_size == 1:
            return self._number is not None
        if not agree and self._processes.device.type == "cuda":
            return False
        flag = torch.tensor(float(self._number is not None), device=self._processes.device)
        return bool(reduce_max(flag))

    def _note(self, number: int, frame: Any) -> None:
        # A second Ctrl-C means now. A second SIGTERM means nothing: schedulers and torchrun send one each.
        if self._number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._number = number
