"""The verdict on made-up numbers."""

from dataclasses import replace

import pytest

from synco_fast.config import parse
from synco_fast.profiling.profile import numbers_of
from synco_fast.profiling.trace import Traced
from synco_fast.profiling.verdict import Numbers, judge

WELL = Numbers(data_wait=0.01, gpu_busy=0.98, communication=0.02, op=0.1, peak=0.6, precision="bf16")
"""A GPU that computes and nothing else."""

CASES = {
    "input-bound": {"data_wait": 0.06},
    "launch-bound": {"gpu_busy": 0.89},
    "communication-bound": {"communication": 0.16},
    "op-bound": {"op": 0.21},
    "memory-bound": {"peak": 0.39},
    "compute-bound": {},
}


@pytest.mark.parametrize("limit", CASES)
def test_each_verdict(limit: str) -> None:
    verdict = judge(replace(WELL, **CASES[limit]))  # type: ignore[arg-type]
    assert verdict.limit == limit
    for value in CASES[limit].values():
        assert f"{value:.1%}" in verdict.evidence


@pytest.mark.parametrize("first", range(len(CASES) - 1))
def test_the_first_that_applies_is_told(first: int) -> None:
    """What starves the device comes first: with a limit all those after it hold, too."""
    limits = list(CASES)
    changes = {key: value for limit in limits[first:] for key, value in CASES[limit].items()}
    assert judge(replace(WELL, **changes)).limit == limits[first]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {"data_wait": 0.05, "gpu_busy": 0.9, "communication": 0.15, "op": 0.2, "peak": 0.4},
        {"data_wait": None, "gpu_busy": None},
    ],
    ids=["at the limits", "a CPU without data"],
)
def test_no_limit_is_passed(changes: dict[str, float | None]) -> None:
    assert judge(replace(WELL, **changes)).limit == "compute-bound"  # type: ignore[arg-type]


def test_the_gpu_is_busy_in_the_step_as_configured() -> None:
    """Kernels of 6 ms: taken apart the step waits for launches and takes 10 ms, as a graph 6.25 ms."""
    stages = {"op": {"share": 0.1}}
    result = {"step": {"time": {"median_ms": 10.0}, "stages": stages}, "encoders": {"share": 0.6}}
    traced = Traced(b"", [], {}, [], device_ms=6.0, nccl_ms=0.0)
    for configured, busy, limit in ((6.25, 0.96, "compute-bound"), (8.0, 0.75, "launch-bound"), (5.0, 1.0, None)):
        found = numbers_of(parse({}, "test"), result | {"configured_step": {"time": {"median_ms": configured}}}, traced)
        assert found.gpu_busy == pytest.approx(busy)
        assert limit is None or judge(found).limit == limit
