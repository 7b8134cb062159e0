"""Where the time of a call of the `cpu` or `cuda` backend goes, by clocks inside it that are off unless recorded."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from synco_fast.ops import compiled
from synco_fast.ops.hard import KINDS

PHASES = ("similarity", "weights", "gradient", "selection", "draws", "parents", *KINDS, "finish", "waiting")
"""What a call's time is divided into; kernels/README.md says where each begins and ends."""

_one_at_a_time = threading.Lock()


class Clock:
    """What the calls inside `record` spent on each phase."""

    def __init__(self, device: torch.device) -> None:
        slots = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
        # (blocks, phases) cycles of a block's multiprocessor; on the CPU (1, phases) nanoseconds of all its threads.
        self._ticks = torch.zeros(slots, len(PHASES), dtype=torch.int64, device=device)

    def shares(self) -> dict[str, float]:
        """Each phase's share of the time of all threads (CPU) or blocks (CUDA), with sum 1. After `record` has ended.

        A share of the time of a call is how long the phase took with all of them at work.

        Raises:
            RuntimeError: no call was recorded.
        """
        ticks = self._ticks.double().sum(0)
        if not ticks.sum():
            raise RuntimeError(f"no phases were recorded: nothing called infonce's {self._ticks.device.type} backend")
        return dict(zip(PHASES, (ticks / ticks.sum()).tolist(), strict=True))


@contextmanager
def record(device: torch.device) -> Iterator[Clock]:
    """Record the phases of all calls of infonce's `cpu` or `cuda` backend with operands on a device, by any thread.

    Results stay the same to the bit. On CUDA it waits for the device at both ends; calls go to one stream, and a call
    that is captured into a CUDA graph is refused. A function that torch.compile has compiled may be called inside, but
    must not contain `record`.

    Raises:
        ValueError: the device is neither a CPU nor a CUDA device.
        RuntimeError: the backend cannot be used here, or another `record` has not ended.
    """
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be a cpu or cuda device, whose backends have clocks; got {device}")
    state = compiled.cpu_status() if device.type == "cpu" else compiled.cuda_status()
    if state != "ok":
        raise RuntimeError(f"phases of backend {device.type} cannot be recorded: {state}")
    if not _one_at_a_time.acquire(blocking=False):
        raise RuntimeError("phases are being recorded already: one record() at a time, and none inside another")
    try:
        clock = Clock(device)
        _synchronize(device)
        torch.ops.synco_fast.record_phases(clock._ticks)
        try:
            yield clock
        finally:
            torch.ops.synco_fast.record_phases(None)
            _synchronize(device)
    finally:
        _one_at_a_time.release()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
