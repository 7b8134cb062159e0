# mypy: allow-untyped-defs, allow-incomplete-defs
"""A kernel around `draw` of triton_philox.py, for tests."""

import triton
import triton.language as tl

from synco_fast.ops.triton_philox import draw


@triton.jit(do_not_specialize=["seed", "row_offset"])
def store_draws(
    first,  # out (B, samples) int32
    second,  # out (B, samples) int32
    coefficient,  # out (B, samples) float32
    step,  # int64 scalar
    interval,  # (2,) float32: the lower end and the length of the coefficient's interval
    seed,
    row_offset,
    number,  # the kind's
    n_hard,
    SAMPLES: tl.constexpr,
):
    row, sample = tl.program_id(0), tl.arange(0, SAMPLES)
    c0, c2, c3 = (row_offset + row).to(tl.uint32), number.to(tl.uint32), tl.load(step).to(tl.uint32)
    low, width = tl.load(interval), tl.load(interval + 1)
    first_place, second_place, c = draw(seed, c0, sample.to(tl.uint32), c2, c3, n_hard, low, width)
    place = row * SAMPLES + sample
    tl.store(first + place, first_place)
    tl.store(second + place, second_place)
    tl.store(coefficient + place, c)
