"""Stopping at the end of a step: when asked to by a signal, or when the time is up."""

import os
import signal
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from synco_fast.engine.distributed import Processes, reduce_max

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Stop:
    """Entered, it notes the signals that schedulers and people send, in place of what they did before.

    Args:
        processes: of the run, which must stop at the same step.
        hours: after so long it is time to stop; None: never. Counted from the start of torchrun, if there is one, as
            a scheduler counts, however often it has started this process.
    """

    def __init__(self, processes: Processes, hours: float | None = None) -> None:
        self._processes, self._hours = processes, hours
        self._started = started(os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else os.getpid())
        self._number: int | None = None
        self._launcher = os.getppid()

    def __enter__(self) -> "Stop":
        self._handlers = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    @property
    def asked(self) -> bool:
        """Whether this process has to stop, of itself."""
        late = self._hours is not None and time.clock_gettime(time.CLOCK_BOOTTIME) - self._started > 3600 * self._hours
        return self._number is not None or late

    def came(self, agree: bool) -> bool:
        """Whether to stop here, see `agreed`."""
        return agreed(self._processes, agree, self.asked)[0]

    def tell_launcher(self) -> None:
        """Have torchrun stop, too, where it would start this process again, and is not what asked to stop.

        For the very end of this process, within its `with`: torchrun then sends SIGTERM to all of its own, which are
        ending anyway and must not die of it. All processes call it.
        """
        if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0:
            self._handlers[signal.SIGTERM] = signal.SIG_IGN  # from the end of the `with` on
            self._processes.barrier()  # nobody is still in the step that wrote the checkpoint
            there = os.getppid() == self._launcher  # and not whoever takes in the processes of a launcher that died
            if there and self._number != signal.SIGTERM and os.environ.get("LOCAL_RANK") == "0":
                os.kill(self._launcher, signal.SIGTERM)

    def _note(self, number: int, frame: Any) -> None:
        # A second Ctrl-C means now. A second SIGTERM means nothing: schedulers and torchrun send one each.
        if self._number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._number = number


def started(process: int) -> float:
    """When a process was started, in seconds of CLOCK_BOOTTIME."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()  # a name may hold anything
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")


def agreed(processes: Processes, agree: bool, *wishes: bool) -> list[bool]:
    """Each wish, if any process has it. All processes call it; on GPUs, several look only to agree, and wait for it."""
    if processes.world_size == 1:
        return list(wishes)
    if not agree and processes.device.type == "cuda":
        return [False] * len(wishes)
    whole = torch.tensor(wishes, dtype=torch.float32, device=processes.device)
    return [wish > 0 for wish in reduce_max(whole).tolist()]
