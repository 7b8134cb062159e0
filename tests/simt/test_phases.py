"""The clocks inside the CUDA kernel, in the emulator, where a clock counts how often its thread has read it.

So every phase that ends adds 1, and how often each ends follows from the plan.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from synco_fast.ops import KINDS, HardNegatives
from synco_fast.ops.phases import PHASES
from tests.ops.cases import SETTINGS, everything
from tests.simt.build import why_not
from tests.simt.infonce import Launch, call, edited_program, launch, program
from tests.simt.planted_infonce import RACE
from tests.simt.test_infonce import ONLY_64, assert_identical, grid_batch

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

MANY = everything(interpolated=700, mixed=700)  # draws in two parts


def expected_phases(out: Launch, batch: int, queue_rows: int, dim: int, hard: HardNegatives, blocks: int) -> Tensor:
    """(blocks, phases): how often each phase ends in each block."""
    tiles = -(-queue_rows // (16 if dim == 256 else 64))
    rows_per_pass, splits = out.counters["rows_per_pass"], out.counters["splits"]
    ends = torch.zeros(blocks, len(PHASES), dtype=torch.int64)
    at = {name: ends[:, place] for place, name in enumerate(PHASES)}
    for first_row in range(0, batch, rows_per_pass):
        rows = min(rows_per_pass, batch - first_row)
        row_tiles = -(-rows // 128)
        for block in range(row_tiles * splits):
            split = block // row_tiles
            own = (split + 1) * tiles // splits - split * tiles // splits
            for name in ("similarity", "weights", "gradient", *(["selection"] if hard.total else [])):
                at[name][block] += own
            at["finish"][block] += 1
        for row in range(rows if hard.total else 0):
            block, before = row % blocks, 0
            for name in ("finish", "selection"):
                at[name][block] += 1
            at["draws"][block] += -(-hard.total // 1024)
            for kind in hard.kinds:
                end = before + hard.count(kind)
                at[kind][block] += -(-end // 1024) - before // 1024
                before = end
        at["finish"] += 1
        at["waiting"] += 2
    at["finish"] += 1
    at["waiting"] += 1
    return ends


def assert_clocks(built: Path, batch: int, queue_rows: int, dim: int, **arguments: Any) -> None:
    """The expected phases, and the results that there are without."""
    operands = grid_batch(batch, queue_rows, dim)
    arguments = {"temperature": 0.07, "processors": 5, **arguments}
    out = launch(built, *operands, **arguments, clocked=True)
    expected = expected_phases(out, batch, queue_rows, dim, arguments["hard"], arguments["processors"])
    found = [dict(zip(PHASES, ends.T.tolist(), strict=True)) for ends in (out.phases, expected)]
    assert found[0] == found[1]
    assert_identical(out, launch(program(), *operands, **arguments))


@pytest.mark.parametrize("hard", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_each_phase_ends_as_often_as_the_plan_says(dim: int, hard: HardNegatives) -> None:
    assert_clocks(program(), 12, 300, dim, hard=hard)


@pytest.mark.parametrize("schedule", ["fwd", "rev", "rand:1", "greedy:1"])
def test_more_draws_than_are_made_at_once_and_any_schedule(schedule: str) -> None:
    assert_clocks(program(), 4, 300, 64, hard=MANY, schedule=schedule)


def test_several_passes_row_tiles_and_blocks_without_work() -> None:
    assert_clocks(program(), 300, 500, 64, hard=everything(), processors=1)
    assert_clocks(program(), 130, 70, 64, hard=HardNegatives.none(), processors=9)


def test_phases_that_must_be_are_there_and_no_others() -> None:
    """Said once without the plan."""
    operands = grid_batch(12, 300, 64)
    for hard, absent in (
        (everything(), {"parents"}),
        (HardNegatives.none(), {"selection", "draws", "parents", *KINDS}),
    ):
        out = launch(program(), *operands, hard=hard, temperature=0.07, clocked=True)
        assert {name for name, ends in zip(PHASES, out.phases.sum(0), strict=True) if not ends} == absent
    assert not launch(program(), *operands, hard=everything(), temperature=0.07).phases.numel()


MISTAKES = {
    "blocks share a slot": ("common.h", "static_cast<size_t>(blockIdx.x) * kPhases", "0"),
    "every thread adds": ("common.h", "if (threadIdx.x != 0) return;", ""),
    "a lap begins at the first": ("common.h", "      last = now;\n", ""),
    "the clock wraps": ("common.h", "static_cast<int64_t>(now - last)", "static_cast<int64_t>(now) - last"),
    "draws are forgotten": ("synthesis.h", "      clock.lap(kDraws);\n", ""),
    "kinds that are absent": (
        "synthesis.h",
        "  if (left <= 0) return;\n",
        "  if (left <= 0) return clock.lap(phase_of(kind));\n",
    ),
    "waiting is work": ("infonce.cu", "    clock.lap(kWaiting);\n    finish_rows", "    finish_rows"),
}


def with_mistake(name: str, variant: str = "plain") -> Path:
    file, old, new = MISTAKES[name]
    edits = {"infonce.cu": ONLY_64[:2]}
    edits[file] = (*edits.get(file, ()), (old, new))
    return edited_program(f"clocks-{name.replace(' ', '-')}", edits, variant, flags=("-O0", "-Wno-unused"))


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_caught(name: str) -> None:
    hard = MANY if name == "draws are forgotten" else SETTINGS["noisy"]
    with pytest.raises(AssertionError, match="similarity"):
        assert_clocks(with_mistake(name), 12, 300, 64, hard=hard)


@pytest.mark.parametrize("name", ["blocks share a slot", "every thread adds"])
def test_a_slot_with_two_writers_is_a_race(name: str) -> None:
    built = with_mistake(name, "threads")
    done, _ = call(
        built, *grid_batch(5, 300, 64), hard=HardNegatives.none(), temperature=0.07, processors=3, clocked=True
    )
    assert done.returncode != 0 and RACE in done.stderr
