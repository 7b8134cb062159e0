"""Time, its ratios, and the device's peaks: what it can do at best, against which times are judged."""

import gc
import math
import random
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from bench.case import DTYPES
from synco_fast.machine import cpu_name

Key = TypeVar("Key", bound=Hashable)

_FLUSH_BYTES = 2**28
_FLUSHES = 16
_MIN_ROUNDS = 3
_RESAMPLES, _IN_A_TAIL, _MOST_RESAMPLES = 4000, 50, 100_000

ENOUGH_ROUNDS = 6
"""With fewer, even the extremes enclose the median with less than 95%: 1 - 2 / 2^n."""


class Peaks(NamedTuple):
    """Floating-point operations and bytes a second."""

    flops: float
    bandwidth: float


class Quantiles(NamedTuple):
    """Of times in milliseconds."""

    median: float
    p20: float
    p80: float
    n: int


def quantiles(times: Sequence[float]) -> Quantiles:
    values = torch.tensor(times, dtype=torch.float64)
    p20, median, p80 = (float(values.quantile(share)) for share in (0.2, 0.5, 0.8))
    return Quantiles(median, p20, p80, len(times))


class Interval(NamedTuple):
    """A median, and where it lies with a probability of 95%, or what else is said."""

    median: float
    low: float
    high: float


def paired_ratio(times: Sequence[float], base: Sequence[float]) -> Interval:
    """Of speeds, base / time, within each round: the median over rounds, and its interval by the bootstrap."""
    ratios = [of_base / of_this for of_this, of_base in zip(times, base, strict=True)]
    return interval(quantiles(ratios).median, resampled_medians(ratios, seed=0))


def resampled_medians(values: Sequence[float], seed: int, tail: float = 0.025) -> Tensor:
    """Medians (4000 or more,) float64 of the values drawn anew, as many and with replacement (Efron's bootstrap).

    So many that 50 are expected beyond a quantile of `tail`, up to 100,000 in all.
    """
    draws = min(max(_RESAMPLES, math.ceil(_IN_A_TAIL / tail)), _MOST_RESAMPLES)
    drawn = torch.randint(len(values), (draws, len(values)), generator=torch.Generator().manual_seed(seed))
    return torch.tensor(values, dtype=torch.float64)[drawn].quantile(0.5, dim=1)


def interval(median: float, resampled: Tensor, tail: float = 0.025) -> Interval:
    """By percentiles of what was drawn anew, with a share of `tail` beyond each end."""
    return Interval(median, float(resampled.quantile(tail)), float(resampled.quantile(1 - tail)))


def interleaved(
    steps: dict[Key, Callable[[], Any]],
    device: str,
    *,
    warm_up: int,
    rounds: int,
    seconds: float,
    around: Mapping[Key, Callable[[], AbstractContextManager[Any]]] | None = None,
) -> dict[Key, list[float]]:
    """Milliseconds of each step in each round.

    A round runs every step once, in an order drawn anew, so that what disturbs the machine for a while disturbs all of
    them, and none always runs after the same other. Rounds end early once `seconds` are over, but not before three.
    On a GPU the device is idle, then busy emptying its L2 cache for about a millisecond, and events on the stream take
    the time of what follows. So the host has that head start, as it has in training where nothing makes it wait: only
    a step that takes the host longer is charged for launching it. `around` makes what a step runs within, untimed.
    """
    within = around or {}
    for _ in range(warm_up):
        for key, step in steps.items():
            with within.get(key, nullcontext)():
                step()
    once = _once_on_gpu if device == "cuda" else _once_on_cpu
    times: dict[Key, list[float]] = {key: [] for key in steps}
    order, shuffle = list(steps), random.Random(0).shuffle
    gc.collect()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        for done in range(rounds):
            if done >= _MIN_ROUNDS and time.perf_counter() > end:
                break
            shuffle(order)
            for key in order:
                with within.get(key, nullcontext)():
                    times[key].append(once(steps[key]))
    finally:
        gc.enable()
    return times


def _once_on_cpu(step: Callable[[], Any]) -> float:
    start = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - start)


def _once_on_gpu(step: Callable[[], Any]) -> float:
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    for _ in range(_FLUSHES):
        flush.zero_()
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


class Yardstick:
    """What the device can do at best, measured in the same rounds as all else: no table to go out of date.

    Of the rounds, the fastest of a large copy, which reads and writes, and of a large matrix product, in each dtype of
    the queue and in float32 (float16 on most CPUs is no use). What fits a cache moves faster than that.

    Attributes:
        steps: to be timed with all the others.
    """

    def __init__(self, device: str, dtypes: Sequence[str], *, quick: bool = False) -> None:
        # A GPU of today reaches its peak with products of 8192 and not of 2048; its copy takes half a millisecond.
        size, copied = (256, 2**24) if quick else (8192, 2**30) if device == "cuda" else (2048, 2**28)
        source = torch.zeros(copied, dtype=torch.uint8, device=device)
        target = torch.ones_like(source)
        self._flops, self._bytes = 2 * size**3, 2 * copied
        self.steps: dict[str, Callable[[], Any]] = {"copy": lambda: target.copy_(source)}
        for choice in sorted({*dtypes, "float32"} - ({"float16"} if device == "cpu" else set())):
            self.steps[f"product {choice}"] = _product(DTYPES[choice], size, device)

    def peaks(self, times: Mapping[Any, Sequence[float]], dtype: str) -> Peaks:
        """For a queue of this dtype, from the times of `steps` in milliseconds: its product or float32's."""
        products = [min(times[name]) for name in (f"product {dtype}", "product float32") if name in self.steps]
        return Peaks(1e3 * self._flops / min(products), 1e3 * self._bytes / min(times["copy"]))


def _product(dtype: torch.dtype, size: int, device: str) -> Callable[[], Any]:
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return lambda: torch.mm(left, right)


def device_name(device: str) -> str:
    """The processor's or the GPU's name."""
    return torch.cuda.get_device_name() if device == "cuda" else cpu_name()
