"""Hard sets, parents and coefficients inside the CUDA kernel, in the emulator, bit for bit those of every backend."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from synco_fast.ops import HardNegatives
from tests.ops.cases import everything, exact_rows, tied_rows, with_n_hard
from tests.ops.recorded import DRAWN, PLACES, assert_same_draws
from tests.simt.build import why_not
from tests.simt.infonce import ROW_STATS, call, edited_program

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

# Stores in the kernel, at the places where the hard set is complete and where a draw is used; written behind the rest.
RECORDING = {
    "infonce.h": (
        (
            "  unsigned char* workspace;        //",
            "  int* hard_sets;                  // (batch, n_hard)\n"
            "  Draw* draws;                     // (batch, total)\n"
            "  unsigned char* workspace;        //",
        ),
    ),
    "finish.h": (
        (
            "    pull_all<dim>(a, query, shared.synthesis, sum, clock);\n",
            "    for (int i = thread; i < a.hard.n_hard; i += kThreads)\n"
            "      a.hard_sets[batch_row * a.hard.n_hard + i] = shared.selection.hard_set[i];\n"
            "    pull_all<dim>(a, query, shared.synthesis, sum, clock);\n",
        ),
    ),
    "synthesis.h": (
        (
            "    const uint32_t sample = ",
            "    const int place = static_cast<int>(query.row - a.row_offset) * a.hard.total() + start + own;\n"
            "    if (i < left && lane_id() % kGroup<dim> == 0) a.draws[place] = shared.draws[own];\n"
            "    const uint32_t sample = ",
        ),
    ),
    "infonce_main.cpp": (
        (
            "  const synco::cuda::Device device{",
            "  const size_t hard_rows = static_cast<size_t>(h.batch) * h.n_hard;\n"
            "  const size_t draws = static_cast<size_t>(h.batch) * a.hard.total();\n"
            "  a.hard_sets = device_array<int>(hard_rows);\n"
            "  a.draws = device_array<synco::Draw>(draws);\n"
            "  const synco::cuda::Device device{",
        ),
        (
            "  std::fclose(output);",
            "  write(output, a.hard_sets, hard_rows);\n  write(output, a.draws, draws);\n  std::fclose(output);",
        ),
    ),
}


@pytest.fixture(scope="module")
def recording() -> Path:
    return edited_program("recording", RECORDING, flags=("-O1",))


def check(built: Path, q: Tensor, queue: Tensor, hard: HardNegatives, place: dict[str, int], **device: Any) -> None:
    done, output = call(
        built, q, exact_rows(*q.shape, 38).float(), queue, hard=hard, temperature=0.2, **place, **device
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    batch, dim = q.shape
    recorded = torch.frombuffer(
        bytearray(output[4 * (1 + batch * dim + ROW_STATS) + 2 * 8 * batch :]), dtype=torch.int32
    )
    hard_sets, draws = recorded.split([batch * hard.n_hard, batch * hard.total * 3])
    first, second, coefficients = draws.view(batch, hard.total, 3).unbind(-1)
    assert_same_draws(
        hard_sets.view(batch, hard.n_hard).long(),
        first.long(),
        second.long(),
        coefficients.contiguous().view(torch.float32),
        q,
        queue,
        hard=hard,
        **place,
    )


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("n_hard", [1, 37, 300])
def test_exact_arithmetic(recording: Path, dim: int, n_hard: int) -> None:
    """Full of ties at the threshold; n_hard = 300 is the whole queue."""
    q, queue = exact_rows(6, dim, seed=36).float(), exact_rows(300, dim, seed=37).half()
    for hard, place in zip(DRAWN.values(), PLACES, strict=True):
        check(recording, q, queue, with_n_hard(hard, n_hard), place)


@pytest.mark.parametrize("n_hard", [1, 100, 1700])
def test_a_collapsed_queue(recording: Path, n_hard: int) -> None:
    """All similarities tie in float16, and in part in float32 too."""
    q, queue = tied_rows(5, 3200)
    check(recording, q.float(), queue.half(), with_n_hard(DRAWN["odd lengths"], n_hard), PLACES[1])
    one = exact_rows(1, 64, seed=39).half().expand(3200, 64)
    check(recording, q.float(), one, everything(n_hard), PLACES[2])


def test_several_passes(recording: Path) -> None:
    """Rows of the batch, not of the pass."""
    q, queue = exact_rows(130, 64, seed=36).float(), exact_rows(300, 64, seed=37).half()
    check(recording, q, queue, everything(37), PLACES[0], processors=1)
