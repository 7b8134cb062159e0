"""Rows as bench.step writes them, made by hand."""

from typing import Any

from bench.rows import Row
from bench.step_rows import Timed, described, measured
from synco_fast.config import PRESETS, parse

ABOUT: Row = {
    "device": "Slow CPU",
    "threads": 2,
    "versions": {"torch": "9.9", "cuda": None},
    "commit": "abc1234",
    "date": "2026-01-02T03:04:05+00:00",
}


def step_rows(times: dict[str, list[float]], *, batch: int = 64, dim: int = 128, **about: Any) -> list[Row]:
    """Rows of one run. times: of each contender's step in each round, ms."""
    found = []
    for name, of_step in times.items():
        method = name.partition(" ")[0]
        config = parse(
            {
                "method": method if method in PRESETS else "moco",
                "data": {"batch_size": batch},
                "model": {"dim": dim},
                "trainer": {"precision": "fp32"},
            },
            name,
        )
        timed = Timed(
            of_step, {base: times[base] for base in ("moco_eager", "moco") if base in times}, 1, None, 10**9, 1e11
        )
        description = described(name, config, None if method in PRESETS else "plain", None)
        found.append(measured(description, timed, {**ABOUT, **about}))
    return found
