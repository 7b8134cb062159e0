"""Timing of several things in turn, so that what disturbs the machine for a while disturbs all of them."""

import gc
import random
import time
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)
Run = Callable[[], object]

_BUSY_BYTES = 2**26
_BUSY_WRITES = 64


def interleaved(
    choices: dict[Key, Run], clock: Callable[[Run, torch.device], int], device: torch.device, rounds: int
) -> dict[Key, list[int]]:
    """Nanoseconds of each choice in each round by a clock below, after one call of each to warm up.

    A round runs every choice once, in an order drawn anew. The order is the same on every process, as processes that
    wait for each other must take the same choice.
    """
    for run in choices.values():
        run()
    times: dict[Key, list[int]] = {key: [] for key in choices}
    order, shuffle = list(choices), random.Random(0).shuffle
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            shuffle(order)
            for key in order:
                times[key].append(clock(choices[key], device))
    finally:
        gc.enable()
    return times


def wall_clock(run: Run, device: torch.device) -> int:
    """From an idle device to an idle device, launching included."""
    _wait(device)
    start = time.perf_counter_ns()
    run()
    _wait(device)
    return time.perf_counter_ns() - start


def device_clock(run: Run, device: torch.device) -> int:
    """The device's work alone; on a CPU that is all.

    A CUDA device is kept busy for a millisecond or two before, so that the host is ahead of it as it is in training;
    that empties the L2 cache, too.
    """
    if device.type != "cuda":
        return wall_clock(run, device)
    busy = torch.empty(_BUSY_BYTES, dtype=torch.int8, device=device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    for _ in range(_BUSY_WRITES):
        busy.zero_()
    start.record()
    run()
    end.record()
    end.synchronize()
    return round(1e6 * start.elapsed_time(end))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
