"""The CUDA kernel in the emulator against float64, its counters, and mistakes planted into it.

Rows lie on a grid (`exact_rows`, `grid_rows`), so that no hard set hangs on a rounding and a single wrong parent shows.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from synco_fast.ops import KINDS, HardNegatives
from tests.ops.cases import (
    SETTINGS,
    everything,
    exact_rows,
    grid_rows,
    near,
    tied_rows,
    with_n_hard,
)
from tests.ops.random_calls import FULL, Case, calls, cases
from tests.simt.build import why_not
from tests.simt.infonce import Launch, assert_right, call, edited_program, launch, program
from tests.simt.planted_infonce import PLANTED, WRONG, Planted

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

ONLY_64 = (
    ("  if (dim == 128) return launch<128>(arguments, plan, stream);\n", ""),
    ("  if (dim == 256) return launch<256>(arguments, plan, stream);\n", ""),
    ("arguments.phases ? infonce_kernel<dim, true> : infonce_kernel<dim, false>", "infonce_kernel<dim, false>"),
)
"""For programs that are built anew and need one width and no clocks."""

every_setting = pytest.mark.parametrize("hard", SETTINGS.values(), ids=SETTINGS.keys())


def assert_same_answer(
    built: Path,
    q: Tensor,
    k: Tensor,
    queue: Tensor,
    *,
    hard: HardNegatives,
    temperature: float,
    exact: bool = False,
    seed: int = 4,
    step: int = 5,
    row_offset: int = 6,
    **device: Any,
) -> Launch:
    """As `assert_right`. device: processors, shared_bytes, schedule."""
    place = {"seed": seed, "step": step, "row_offset": row_offset}
    out = launch(built, q, k, queue, hard=hard, temperature=temperature, **place, **device)
    assert_right(out, q, k, queue, hard=hard, temperature=temperature, exact=exact, **place)
    return out


def grid_batch(batch: int, queue_rows: int, dim: int, seed: int = 50) -> tuple[Tensor, Tensor, Tensor]:
    q = grid_rows(batch, dim, seed)
    return q.float(), near(q, seed + 1).float(), grid_rows(queue_rows, dim, seed + 2).half()


def tied_batch(batch: int, queue_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    q, queue = tied_rows(batch, queue_rows)
    return q.float(), near(q, 61).float(), queue.half()


@every_setting
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("n_hard", [1, 37, 300])
def test_exact_arithmetic(hard: HardNegatives, dim: int, n_hard: int) -> None:
    """Full of ties, at the threshold and with the positive; n_hard = 300 is the whole queue."""
    q, queue, k = exact_rows(6, dim, seed=36), exact_rows(300, dim, seed=37), exact_rows(6, dim, seed=38)
    assert_same_answer(
        program(), q.float(), k.float(), queue.half(), hard=with_n_hard(hard, n_hard), temperature=0.2, exact=True
    )


SIZES = {"room": 2**30} if FULL else {"room": 2**25, "queue_rows": 4000}


@settings(max_examples=cases(100), deadline=None, derandomize=not FULL)
@given(case=calls(queue_dtypes=st.just(torch.float16), synthetic=10, **SIZES), processors=st.integers(1, 9))
def test_random_calls(case: Case, processors: int) -> None:
    assert_same_answer(program(), *case.operands(), **case.arguments, processors=processors)


@pytest.mark.parametrize("n_hard", [1, 100, 1700, 3199])
def test_a_collapsed_queue(n_hard: int) -> None:
    """Thousands of ties, in float16 and in float32; or in float16 alone."""
    q, k = exact_rows(5, 64, seed=39), exact_rows(5, 64, seed=40)
    queue = torch.cat([q[:1].expand(1500, 64), exact_rows(1, 64, seed=41).expand(1700, 64)])
    hard = replace(everything(n_hard), interpolated=64, mixed=64)
    assert_same_answer(program(), q.float(), k.float(), queue.half(), hard=hard, temperature=0.07)
    assert_same_answer(program(), *tied_batch(5, 3200), hard=hard, temperature=0.2)


@pytest.mark.parametrize("hard", [HardNegatives.none(), everything(40)], ids=["none", "all"])
def test_several_passes(hard: HardNegatives) -> None:
    """One processor holds one row tile of sums; and, with another limit, the workspace 128 or 11 queries."""
    operands = grid_batch(300, 500, 64)
    arguments = {"hard": hard, "temperature": 0.2, "exact": True}
    out = assert_same_answer(program(), *operands, **arguments, processors=1)
    assert out.counters["rows_per_pass"] == 128
    whole = launch(program(), *operands, hard=hard, temperature=0.2, seed=4, step=5, row_offset=6, processors=3)
    assert whole.counters["rows_per_pass"] == 300
    if not hard.total:
        return
    for limit, rows in ((330_000, 128), (100_000, 11)):
        edits = {"infonce.h": (("size_t{64} << 20", f"size_t{{{limit}}}"),), "infonce.cu": ONLY_64}
        small = edited_program(f"limit-{limit}", edits, flags=("-O1",))
        out = assert_same_answer(small, *operands, **arguments, processors=2)
        assert out.counters["rows_per_pass"] == rows
        assert out.counters["workspace"] <= limit


def assert_identical(one: Launch, other: Launch) -> None:
    for name in ("loss", "gradient", "rank", "rank_all"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert one.stats == other.stats


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_two_runs_and_any_schedule_give_the_same_bits(dim: int) -> None:
    operands = grid_batch(20, 1001, dim)
    arguments = {"hard": everything(300), "temperature": 0.07}
    first = launch(program(), *operands, **arguments)
    for schedule in ("fwd", "rev", "rand:1", "greedy:1"):
        assert_identical(first, launch(program(), *operands, **arguments, schedule=schedule))
    for processors in (1, 7, 30):
        assert_same_answer(program(), *operands, **arguments, processors=processors)


@pytest.mark.parametrize("batch", ["grid", "tied"])
def test_a_row_that_shared_memory_cannot_keep_gives_the_same_bits(batch: str) -> None:
    operands = grid_batch(3, 45_000, 64) if batch == "grid" else tied_batch(3, 45_000)
    arguments = {"hard": everything(1000), "temperature": 0.2, "seed": 4, "step": 5, "row_offset": 6, "processors": 16}
    kept = assert_same_answer(program(), *operands, **arguments)
    read_again = launch(program(), *operands, **arguments, shared_bytes=99 << 10)
    assert (kept.counters["keep_row"], read_again.counters["keep_row"]) == (1, 0)
    assert_identical(kept, read_again)


def test_narrowing_is_not_given_up_for_nothing() -> None:
    """A kernel that fails where it would look through all similarities."""
    edits = {
        "infonce.cu": ONLY_64,
        "candidates.h": (("max_candidates(n)) return all;", "max_candidates(n)) *shared.scan = 1 / (n - n);"),),
    }
    strict = edited_program("strict", edits, flags=("-O1", "-Wno-div-by-zero"))
    arguments = {"temperature": 0.2, "seed": 4, "step": 5, "row_offset": 6}
    for queue_rows, n_hard in ((1001, 5), (1001, 40), (3000, 255), (20_000, 1024)):
        assert_same_answer(strict, *grid_batch(3, queue_rows, 64), hard=everything(n_hard), **arguments)
    done, _ = call(strict, *tied_batch(3, 1000), hard=everything(40), **arguments)
    assert done.returncode != 0, "so many ties do not fit: this is what failing looks like"


@pytest.mark.parametrize("hard", [HardNegatives.none(), everything(40)], ids=["none", "all"])
@pytest.mark.parametrize("variant", ["sanitized", "threads"])
def test_nothing_to_report(variant: str, hard: HardNegatives) -> None:
    built = sanitized() if variant == "sanitized" else program(variant)
    for dim in (64, 256) if variant == "sanitized" else (256,) if hard.total else (64,):
        arguments = {"hard": hard, "temperature": 0.07, "processors": 3}
        watched = assert_same_answer(built, *grid_batch(20, 300, dim), **arguments, clocked=True)
        plain = launch(program(), *grid_batch(20, 300, dim), **arguments, seed=4, step=5, row_offset=6)
        assert_identical(watched, plain)
    if hard.total:
        assert_same_answer(built, *tied_batch(3, 300), hard=hard, temperature=0.2)


def sanitized() -> Path:
    """With clocks, two widths, which differ in where the queries are, and not optimised: that would take a minute."""
    return edited_program("sanitized", {"infonce.cu": ONLY_64[:1]}, "sanitized", flags=("-O0",))


def traffic(batch: int, queue_rows: int, dim: int, hard: HardNegatives, splits: int) -> int:
    """Bytes of global memory by the model of kernels/README.md, with float32 q and k."""
    row_tiles = -(-batch // 128)
    parents = sum(hard.count(kind) * (2 if kind == "mixed" else 1) for kind in KINDS)
    queue = row_tiles * queue_rows * dim * 2
    similarities = 2 * batch * queue_rows * 2 if hard.total else 0
    operands = (splits + 1) * 2 * batch * dim * 4
    sums = 2 * splits * batch * (dim + 2) * 4
    return queue + similarities + operands + sums + batch * (parents * dim * 2 + dim * 4 + 2 * 8 + 2 * 16 * 4)


@pytest.mark.parametrize("hard", [HardNegatives.none(), HardNegatives.synco()], ids=["moco", "synco"])
def test_the_default_size(hard: HardNegatives) -> None:
    """The right answer on 132 processors, and no more work than there has to be."""
    batch, queue_rows, dim = 256, 65536, 128
    out = assert_same_answer(
        program(), *grid_batch(batch, queue_rows, dim), hard=hard, temperature=0.2, processors=132, seconds=200
    )
    counters = out.counters
    needed = 4 * batch * queue_rows * dim / (2 * 16 * 8 * 16)
    assert needed <= counters["mma"] <= 1.05 * needed
    # All the processors, but for those that could only shorten what is not the longest.
    tiles = -(-2 * (queue_rows // 64) // 132)
    assert counters["mma"] / counters["blocks_with_mma"] <= tiles * 4 * 128 * 64 * dim / 4096
    assert counters["blocks_with_mma"] == 132
    assert counters["cp_async_bytes"] == 2 * queue_rows * dim * 2 + (batch * queue_rows * 2 if hard.total else 0)
    assert counters["grid_barriers"] == 2
    assert counters["workspace"] <= 64 << 20
    moved = sum(counters[name] for name in ("cp_async_bytes", "global_load_bytes", "global_store_bytes"))
    print(
        f"{moved} bytes, {moved / traffic(batch, queue_rows, dim, hard, counters['splits']):.3f} of the model", counters
    )
    assert moved <= 1.25 * traffic(batch, queue_rows, dim, hard, counters["splits"])
    if not hard.total:
        sums = counters["splits"] * batch * (dim + 2) * 4
        assert counters["global_store_bytes"] <= sums + batch * (dim * 4 + 2 * 8 + 16 * 4) + 17 * 4
        assert counters["workspace"] <= sums + batch * 16 * 4 + 5 * 256


def planted_input(name: str) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
    # Few enough that narrow() narrows, unless an input says otherwise.
    common = {"hard": everything(12), "temperature": 0.2, "seed": 2**33 + 5, "processors": 3}
    if name == "race":  # two queries to a block
        return grid_batch(5, 300, 64), {**common, "hard": everything(12, interpolated=40, adversarial=40)}
    if name == "many":  # more than are drawn at once
        return grid_batch(2, 300, 64), {**common, "hard": everything(12, interpolated=700, mixed=700)}
    if name == "units":
        return grid_batch(130, 300, 64), {**common, "hard": HardNegatives.none(), "processors": 1}
    if name == "exact":
        operands = exact_rows(6, 64, 36).float(), exact_rows(6, 64, 38).float(), exact_rows(300, 64, 37).half()
        return operands, common
    if name == "passes":
        return grid_batch(300, 500, 64), {**common, "processors": 2}
    if name == "sharp":  # similarities ascend, so that exponents grow
        q, k, queue = grid_batch(5, 300, 64)
        order = (queue.float() @ q[0]).argsort()
        return (q, -k, queue[order]), {**common, "hard": HardNegatives.none(), "temperature": 0.02, "processors": 1}
    if name == "opposite":  # the positive lies below 0, which is what is beyond the queue
        q, k, queue = grid_batch(5, 300, 64)
        return (q, -k, queue), common
    if name == "whole":
        return grid_batch(5, 301, 64), {**common, "hard": everything(301)}
    if name == "unnarrowed":  # two queries to a block
        return grid_batch(5, 301, 64), {**common, "hard": everything(100)}
    if name == "collapsed":
        return tied_batch(5, 1000), common
    if name == "ties":
        return tied_batch(5, 500), {**common, "hard": everything(100, mixed=64)}
    return grid_batch(5, 301, 64), common


@pytest.mark.parametrize("name", sorted({planted.input for planted in PLANTED.values()}))
def test_the_inputs_that_catch_mistakes_pass_without(name: str) -> None:
    operands, arguments = planted_input(name)
    assert_same_answer(program(), *operands, **arguments)


@pytest.mark.parametrize("planted", PLANTED.values(), ids=PLANTED.keys())
def test_a_mistake_is_caught(planted: Planted) -> None:
    edits = {"infonce.cu": ONLY_64}
    edits[planted.file] = (*edits.get(planted.file, ()), (planted.old, planted.new), *planted.more)
    name = "-".join(next(name for name, other in PLANTED.items() if other is planted).split()).replace("'", "")
    built = edited_program(name, edits, planted.variant, flags=("-O0", "-Wno-unused"))
    operands, arguments = planted_input(planted.input)
    if planted.evidence == WRONG:
        done, _ = call(built, *operands, **arguments, schedule=planted.schedule)
        assert (done.returncode, done.stderr) == (0, "")
        with pytest.raises(AssertionError):
            assert_same_answer(built, *operands, **arguments, schedule=planted.schedule)
    else:
        done, _ = call(built, *operands, **arguments, schedule=planted.schedule)
        assert done.returncode != 0
        assert planted.evidence in done.stderr
