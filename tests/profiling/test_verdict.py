"""The verdict on made-up numbers."""

from dataclasses import replace

import pytest

from synco_fast.config import key_paths
from synco_fast.profiling.verdict import Numbers, judge

WELL = Numbers(data_wait=0.01, gpu_busy=0.98, host_busy=0.99, communication=0.02, op=0.1, peak=0.6, precision="bf16")
"""A GPU that computes and nothing else."""

CASES = {
    "input-bound": {"data_wait": 0.06},
    "launch-bound": {"gpu_busy": 0.89},
    "communication-bound": {"communication": 0.16},
    "op-bound": {"op": 0.21},
    "memory-bound": {"peak": 0.39},
    "compute-bound": {},
}
KEYS = {
    "input-bound": {"data.threads", "data.prefetch", "data.root", "data.augmentation"},
    "launch-bound": {"speed.cuda_graph", "speed.compile"},
    "communication-bound": {"trainer.accumulate", "bn.mode"},
    "op-bound": {"queue.dtype", "negatives.n_hard", "loss.backend", "queue.size"},
    "memory-bound": {"trainer.precision", "speed.channels_last", "speed.compile"},
    "compute-bound": {"data.image_size", "model.arch", "trainer.device"},
}


@pytest.mark.parametrize("limit", CASES)
def test_each_verdict(limit: str) -> None:
    verdict = judge(replace(WELL, **CASES[limit]))  # type: ignore[arg-type]
    assert verdict.limit == limit
    assert set(verdict.advice) == KEYS[limit] <= set(key_paths())
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
        {"data_wait": None, "gpu_busy": None, "host_busy": None},
        {"gpu_busy": 0.5, "host_busy": 0.4},
    ],
    ids=["at the limits", "a CPU without data", "a host that waits"],
)
def test_no_limit_is_passed(changes: dict[str, float | None]) -> None:
    assert judge(replace(WELL, **changes)).limit == "compute-bound"  # type: ignore[arg-type]
