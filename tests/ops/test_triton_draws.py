"""Hard sets, parents and coefficients of the `triton` backend, bit for bit those of every backend."""

import pytest
import torch
from torch import Tensor

from synco_fast.ops import KINDS, HardNegatives, triton_infonce
from synco_fast.ops.draws import coefficient_range
from tests.ops.cases import everything, exact_rows, tied_rows, with_n_hard
from tests.ops.recorded import DRAWN, PLACES, assert_same_draws
from tests.ops.triton_runs import DEVICE, here, run

pytestmark = here


def draws(hard: HardNegatives, rows: int, *, seed: int, step: int, row_offset: int) -> tuple[Tensor, Tensor, Tensor]:
    """Both positions and the coefficient (rows, hard.total) of all kinds, from the function that the kernel calls."""
    from tests.ops.triton_draws import store_draws

    kinds = []
    for kind in hard.kinds:
        samples = 1 << (hard.count(kind) - 1).bit_length()
        low, high = coefficient_range(kind, hard)
        out = [torch.empty(rows, samples, dtype=d, device=DEVICE) for d in (torch.int32, torch.int32, torch.float32)]
        store_draws[(rows,)](
            *out,
            torch.tensor(step, device=DEVICE),
            torch.tensor([low, high - low], dtype=torch.float32, device=DEVICE),
            seed,
            row_offset,
            KINDS.index(kind),
            hard.n_hard,
            SAMPLES=samples,
        )
        kinds.append([x[:, : hard.count(kind)].cpu() for x in out])
    first, second, coefficient = (torch.cat(parts, dim=1) for parts in zip(*kinds, strict=True))
    return first.long(), second.long(), coefficient


def check_draws(
    q: Tensor, queue: Tensor, hard: HardNegatives, place: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hard set that a whole call selects, and the draws from it."""
    selected, select = [], triton_infonce._select

    def recorder(*arguments: object) -> Tensor:
        selected.append(select(*arguments))
        return selected[-1]

    monkeypatch.setattr(triton_infonce, "_select", recorder)
    run(triton_infonce, *(x.to(DEVICE) for x in (q, exact_rows(*q.shape, 42).float(), queue)), hard=hard, **place)
    hard_set = torch.cat(selected).long().cpu()
    assert_same_draws(hard_set, *draws(hard, len(q), **place), q, queue, hard=hard, **place)


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize(
    ("n_hard", "dtype"),
    [(1, torch.float16), (300, torch.float16), (37, torch.bfloat16), (37, torch.float32)],
)
def test_exact_arithmetic(dim: int, n_hard: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full of ties at the threshold; n_hard = 300 is the whole queue."""
    q, queue = exact_rows(2, dim, seed=36).float(), exact_rows(300, dim, seed=37).to(dtype)
    check_draws(q, queue, everything(n_hard), PLACES[dim // 128], monkeypatch)


@pytest.mark.parametrize("n_hard", [1, 100])
def test_a_collapsed_queue(n_hard: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All similarities tie in float16, and in part in float32 too."""
    q, queue = tied_rows(2, 1700)
    check_draws(q.float(), queue.half(), everything(n_hard), PLACES[0], monkeypatch)


def test_several_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes of two rows."""
    monkeypatch.setattr(triton_infonce, "WORKSPACE", 2 * 4 * 320)
    q, queue = exact_rows(5, 64, seed=36).float(), exact_rows(300, 64, seed=37).half()
    check_draws(q, queue, everything(37), PLACES[0], monkeypatch)


@pytest.mark.parametrize("place", PLACES, ids=["small", "large", "wrapping"])
@pytest.mark.parametrize("hard", DRAWN.values(), ids=DRAWN.keys())
def test_draws_anywhere(hard: HardNegatives, place: dict[str, int]) -> None:
    q, queue = exact_rows(3, 64, seed=36).float(), exact_rows(300, 64, seed=37).float()
    whole = torch.arange(300).expand(3, 300)
    hard = with_n_hard(hard, 300)
    assert_same_draws(whole, *draws(hard, 3, **place), q, queue, hard=hard, **place)
