"""Reading a trace: time covered by overlapping kernels, memory over a step."""

import pytest

from synco_fast.profiling.trace import covered_ms, memory


def span(start: float, length: float) -> dict[str, float]:
    return {"ts": start, "dur": length}


@pytest.mark.parametrize(
    ("spans", "covered"),
    [
        ([], 0.0),
        ([span(5000, 1000), span(0, 1000)], 2.0),
        ([span(0, 3000), span(1000, 1000)], 3.0),  # one inside another
        ([span(0, 3000), span(1000, 3000), span(3500, 1000)], 4.5),
    ],
)
def test_covered_time_counts_once(spans: list[dict[str, float]], covered: float) -> None:
    assert covered_ms(spans) == pytest.approx(covered)


def allocation(time: float, size: int, total: int, device: int = 0) -> dict[str, object]:
    args = {"Bytes": size, "Total Allocated": total, "Device Type": device, "Device Id": 0 if device else -1}
    return {"name": "[memory]", "ts": time, "args": args}


def test_memory_of_a_step() -> None:
    """It begins with what was there, whether that was allocated under the profiler or before it."""
    events = [
        allocation(2500, 30, 80),
        allocation(500, 50, 50),
        allocation(3000, -80, 0),
        allocation(9000, 7, 7),
        allocation(2000, -100, 900, device=1),
        {"name": "step", "ts": 1000},
    ]
    assert memory(events, 1000, 4000) == {
        "cpu": [[0.0, 50], [1.5, 80], [2.0, 0], [3.0, 0]],
        "cuda:0": [[0.0, 1000], [1.0, 900], [3.0, 900]],
    }


def test_a_long_step_keeps_its_peak() -> None:
    events = [allocation(n, 1, 10_000_000 if n == 7_777 else n) for n in range(10_000)]
    (points,) = memory(events, 0, 10_000).values()
    assert len(points) < 2000
    assert max(size for _, size in points) == 10_000_000
    assert [time for time, _ in points] == sorted(time for time, _ in points)
