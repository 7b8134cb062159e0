"""Quantiles, intervals, and timing in turn."""

import math
import time

import numpy as np
import pytest
import torch

from synco_fast.profiling.estimates import difference, quantiles
from synco_fast.profiling.rounds import interleaved, wall_clock


def test_quantiles_are_in_milliseconds() -> None:
    found = quantiles([int(1e6) * n for n in range(11)])
    assert found == {"median_ms": 5.0, "p20_ms": 2.0, "p80_ms": 8.0}


def test_a_difference_is_taken_round_by_round() -> None:
    """A machine that grows slower moves both; the difference stays, where that of the medians' spread would not."""
    slower = np.linspace(0, 1e9, 20)
    found = difference((slower + 3e6).astype(int).tolist(), slower.astype(int).tolist())
    assert found == pytest.approx({"median_ms": 3.0, "low_ms": 3.0, "high_ms": 3.0}, abs=1e-5)


def test_the_interval_holds_the_median_as_often_as_it_says() -> None:
    """Of 100 experiments of 15 rounds each. The bootstrap of a median is a little off 95%; a standard deviation of the
    count is sqrt(100 x 0.95 x 0.05) = 2.2, so 88 is three of them below.
    """
    random = np.random.default_rng(1)
    held = 0
    for _ in range(100):
        found = difference(random.normal(2e6, 1e6, 15).astype(int).tolist(), [0] * 15)
        held += found["low_ms"] <= 2.0 <= found["high_ms"]
    assert 88 <= held < 100


def test_every_choice_is_timed_in_every_round() -> None:
    calls: list[str] = []
    choices = {"short": lambda: calls.append("short"), "long": lambda: (calls.append("long"), time.sleep(0.01))}
    times = interleaved(choices, wall_clock, torch.device("cpu"), rounds=8)
    assert all(len(column) == 8 for column in times.values())
    assert min(times["long"]) >= 10_000_000
    timed = calls[2:]  # after one call each to warm up
    assert all(set(timed[i : i + 2]) == {"short", "long"} for i in range(0, 16, 2))
    assert len({tuple(timed[i : i + 2]) for i in range(0, 16, 2)}) == 2  # in either order
    assert math.isfinite(difference(times["long"], times["short"])["low_ms"])
