"""The memory that the op takes beyond its inputs, as the benchmark measures it."""

import sys

import pytest

from bench import memory
from bench.case import Case
from synco_fast.ops import HardNegatives


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory on a CPU is read from /proc")
def test_the_cpu_backend_takes_no_more_for_a_longer_queue() -> None:
    def extra(queue: int) -> int:
        return memory.of_case_on_cpu(
            Case("cpu", "synco", 64, queue, 64, HardNegatives.synco(), 0.2, "float32", "cpu"), threads=1
        )

    short, long = extra(2**14), extra(2**18)
    assert 0 < long <= 1.2 * short + 2**20, "the similarities alone would be 16 times as many: 67 MB"
