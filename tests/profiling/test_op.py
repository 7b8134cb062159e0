"""What the clocks inside the op say of a kind."""

from dataclasses import replace

import pytest

from synco_fast.ops import HardNegatives
from synco_fast.profiling.op import _clocked


def test_a_kind_is_charged_for_what_leaving_it_out_saves() -> None:
    """Of 2 rows, a draw takes one in the mean 1, two draws 1.5, three 1.75."""
    hard = replace(HardNegatives.none(), n_hard=2, interpolated=1, mixed=1)
    shares = {"draws": 0.1, "parents": 0.2, "interpolated": 0.3, "mixed": 0.4}
    assert _clocked(shares, hard, "interpolated", 10) == pytest.approx((3, 3 + 0.5 + 2 * (1 - 1.5 / 1.75)))
    assert _clocked(shares, hard, "mixed", 10) == pytest.approx((4, 4 + 0.5 + 2 * (1 - 1 / 1.75)))


def test_a_kind_alone_is_charged_for_all() -> None:
    hard = replace(HardNegatives.none(), n_hard=8, noisy=4)
    assert _clocked({"draws": 0.1, "parents": 0.2, "noisy": 0.3}, hard, "noisy", 10) == pytest.approx((3, 6))
