"""The precision contract: q rounded once to the queue's dtype, then float32; and what is exact must be identical.

The yardstick is float64 on the operands as the contract rounds them. Hard sets must not hang on a rounding, so either
every row of the queue is in them or the dot products are exact (`exact_rows`).
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from synco_fast.ops import HardNegatives, eager, infonce, synthesize
from synco_fast.ops.reference import hardest_by_sort
from synco_fast.ops.select import hardest
from tests.ops import oracle
from tests.ops.cases import (
    BACKENDS,
    SETTINGS,
    batch,
    everything,
    exact_rows,
    rounding_floor,
    run,
    unit_rows,
    with_n_hard,
)

both = pytest.mark.parametrize("backend", BACKENDS)
every_setting = pytest.mark.parametrize("hard", SETTINGS.values(), ids=SETTINGS.keys())
low_precision = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])


def errors(
    q: Tensor, k: Tensor, queue: Tensor, hard: HardNegatives, temperature: float
) -> dict[str, tuple[float, float]]:
    """Each backend's distance from the float64 reference: the loss, and the gradient's Frobenius norm."""
    operands = q.to(queue.dtype).double(), k.double(), queue.double()
    truth, true_gradient = run("reference", *operands, hard=hard, temperature=temperature)
    found = {}
    for backend in BACKENDS:
        out, gradient = run(backend, q, k, queue, hard=hard, temperature=temperature)
        assert out.loss.dtype == torch.float32 and gradient.dtype == q.dtype
        distance = (gradient.double() - true_gradient).norm().item()
        found[backend] = (abs(out.loss.item() - truth.loss.item()), distance)
    return found


def assert_as_exact_as_the_reference(
    q: Tensor, k: Tensor, queue: Tensor, hard: HardNegatives, temperature: float
) -> None:
    found = errors(q, k, queue, hard, temperature)
    floors = rounding_floor(temperature, len(q))
    for name, eager_error, reference_error, floor in zip(
        ("loss", "gradient"), found["eager"], found["reference"], floors, strict=True
    ):
        assert eager_error <= 2 * reference_error + floor, name
        # Otherwise twice the reference's error would be an empty bound.
        assert reference_error <= 4 * floor, f"the reference's own {name}"


@every_setting
@low_precision
@pytest.mark.parametrize("temperature", [0.02, 0.2, 1.0])
def test_eager_is_as_exact_as_the_reference(hard: HardNegatives, dtype: torch.dtype, temperature: float) -> None:
    q, k, queue = batch(16, 64, 96, seed=30)
    assert_as_exact_as_the_reference(q.float(), k.float(), queue.to(dtype), with_n_hard(hard, 96), temperature)


@every_setting
@low_precision
@pytest.mark.parametrize("temperature", [0.02, 0.2])
def test_eager_is_as_exact_on_a_selected_hard_set(hard: HardNegatives, dtype: torch.dtype, temperature: float) -> None:
    q, queue = exact_rows(8, 64, seed=31), exact_rows(300, 64, seed=32)
    k = torch.nn.functional.normalize(q + 0.5 * unit_rows(8, 64, seed=33), dim=1)
    assert_as_exact_as_the_reference(q.float(), k.float(), queue.to(dtype), with_n_hard(hard, 50), temperature)


@every_setting
@low_precision
def test_eager_is_as_exact_with_the_query_and_its_opposite_in_the_queue(
    hard: HardNegatives, dtype: torch.dtype
) -> None:
    q, k, queue = batch(16, 64, 96, seed=34)
    queue[:32] = torch.cat([q, -q])
    assert_as_exact_as_the_reference(q.float(), k.float(), queue.to(dtype), with_n_hard(hard, 96), 0.07)


@every_setting
@low_precision
@pytest.mark.parametrize("signs", [(1,), (-1,), (1, -1)], ids=["query", "opposite", "both"])
@pytest.mark.parametrize("key", [1, -1])
def test_vectors_that_all_but_cancel(hard: HardNegatives, dtype: torch.dtype, signs: tuple[int, ...], key: int) -> None:
    """Every parent is the query or its opposite, and the positive too, so that every error shows.

    The closed form of a vector of length r takes r^2 as a difference, which multiplies its rounding by 1 / r^2.
    With r uniform on (MIN_NORM, 1) that is 1 / MIN_NORM = 100 times the usual on average; and with one parent for all
    nothing averages out of the gradient: it is off by as much as the logits are, 4 eps. Assuming rows of exactly unit
    length would be off by the whole of a similarity.
    """
    q = unit_rows(1, 64, seed=35).float()
    queue = torch.cat([sign * q for sign in signs]).to(dtype)
    many = replace(hard, n_hard=len(signs) * bool(hard.total), **dict.fromkeys(hard.kinds, 64))
    loss, gradient = errors(q, key * q, queue, many, 0.2)["eager"]
    loss_floor, gradient_floor = rounding_floor(0.2, 1)
    assert loss <= 100 * loss_floor and gradient <= 100 * 4 * gradient_floor


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("n_hard", [1, 37, 300])
def test_exact_arithmetic_is_identical_everywhere(dim: int, n_hard: int) -> None:
    """Hard sets, parents and ranks, bit for bit: plain Python, both backends, every dtype."""
    q, queue = exact_rows(6, dim, seed=36), exact_rows(300, dim, seed=37)
    k = exact_rows(6, dim, seed=38)
    chosen = [oracle.hard_set(row, n_hard) for row in (q @ queue.T).tolist()]
    ranks = (q @ queue.T >= (q * k).sum(dim=1, keepdim=True)).sum(dim=1)
    assert ((q @ queue.T) == (q * k).sum(dim=1, keepdim=True)).any(dim=1).all(), "the positive ties with a negative"

    hard, place = everything(n_hard), {"seed": 4, "step": 5}
    parents = {
        kind: [
            [[chosen[i][j] for j in drawn] for drawn in _drawn_positions(kind, hard, row=6 + i, **place)]
            for i in range(6)
        ]
        for kind in hard.kinds
    }

    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        wide = torch.promote_types(dtype, torch.float32)
        rows, negatives = q.to(wide), queue.to(dtype)
        similarity = rows @ negatives.to(wide).T
        assert hardest(similarity, n_hard)[0].tolist() == chosen
        assert hardest_by_sort(similarity, n_hard)[0].tolist() == chosen

        sets = synthesize(rows, negatives, hard=hard, **place, row_offset=6)
        forms, _ = eager._closed_forms(rows, negatives.to(wide), similarity, hard, 4, torch.tensor(5), 6)
        for kind, form in zip(hard.kinds, forms, strict=True):
            assert sets[kind].parents.tolist() == form.parents.tolist() == parents[kind]

        for backend in BACKENDS:
            out = infonce(rows, k.to(wide), negatives, hard=hard, **place, row_offset=6, backend=backend)
            assert torch.equal(out.rank, ranks), (dtype, backend)


def _drawn_positions(kind: str, hard: HardNegatives, *, row: int, seed: int, step: int) -> list[list[int]]:
    return [
        oracle.draw(kind, hard, seed=seed, step=step, row=row, sample=i, n_hard=hard.n_hard, dim=1)[0]
        for i in range(hard.count(kind))
    ]


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_rank_all_is_identical_everywhere(dim: int) -> None:
    """Keys off the grid: a mixture of a row with itself would tie with the positive up to its rounding."""
    q, queue = exact_rows(6, dim, seed=39), exact_rows(300, dim, seed=40)
    k = unit_rows(6, dim, seed=41)
    found = [
        infonce(q.to(wide), k.to(wide), queue.to(dtype), hard=everything(37), backend=backend).rank_all
        for backend in BACKENDS
        for dtype, wide in (
            (torch.float16, torch.float32),
            (torch.bfloat16, torch.float32),
            (torch.float32, torch.float32),
            (torch.float64, torch.float64),
        )
    ]
    assert 0 < found[0].sum() < 6 * 327
    assert all(torch.equal(ranks, found[0]) for ranks in found)


@both
def test_totally_collapsed(backend: str) -> None:
    """Query, key and queue all one exact vector: every negative ties, the loss is the log of their number."""
    row = exact_rows(1, 64, seed=42).float()
    hard = everything(20, sigma=0.0, delta=0.0, eta=0.0)
    out, gradient = run(backend, row.expand(4, 64), row.expand(4, 64), row.expand(50, 64).half(), hard=hard)
    assert out.rank.tolist() == [50] * 4
    assert out.loss.item() == pytest.approx(math.log(1 + 50 + hard.total), abs=1e-5)
    assert gradient.abs().max() < 1e-5


@both
@pytest.mark.parametrize(
    ("given", "rounded_to"),
    [
        (torch.float32, torch.float16),
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.float16),
        (torch.float64, torch.float32),
        (torch.float16, torch.bfloat16),
    ],
)
def test_the_query_is_rounded_once_to_the_dtype_of_the_queue(
    backend: str, given: torch.dtype, rounded_to: torch.dtype
) -> None:
    """The same answer, bit for bit, as with a query that was rounded before; its gradient passes straight through."""
    q, k, queue = batch(4, 64, 40, seed=43)
    q, queue = q.to(given), queue.to(rounded_to)
    assert not torch.equal(q, q.to(rounded_to).to(given)), "a query that rounding changes"
    a, grad_a = run(backend, q, k.float(), queue, hard=everything())
    # Widened, so that the gradient comes back in float64.
    b, grad_b = run(backend, q.to(rounded_to).double(), k.float(), queue, hard=everything())
    assert torch.equal(a.loss, b.loss) and torch.equal(a.rank_all, b.rank_all)
    assert torch.equal(grad_a, grad_b.to(given))


@both
@pytest.mark.parametrize("queue_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_of_the_result(backend: str, queue_dtype: torch.dtype, dtype: torch.dtype) -> None:
    """The loss in float32, or float64 for such a queue; the gradient in q's dtype; near to the float64 answer."""
    q, k, queue = batch(4, 64, 40, seed=44)
    hard = everything(40)
    out, gradient = run(backend, q.to(dtype), k.to(dtype), queue.to(queue_dtype), hard=hard)
    assert out.loss.dtype == torch.promote_types(queue_dtype, torch.float32)
    assert gradient.dtype == dtype
    assert all(value.dtype == torch.float32 for value in out.stats.values())
    exact, exact_gradient = run("reference", q, k, queue, hard=hard)
    eps = max(torch.finfo(d).eps for d in (dtype, queue_dtype))
    assert abs(out.loss.item() - exact.loss.item()) <= 2 * eps / 0.2
    assert (gradient - exact_gradient).norm() <= 2 * eps / (2 * 0.2**2)


def test_keys_are_not_rounded_to_the_dtype_of_the_queue() -> None:
    q, k, queue = batch(4, 64, 40, seed=45)
    rounded, kept = (
        infonce(q.half(), keys, queue.half(), hard=HardNegatives.none()).stats["positive_similarity"]
        for keys in (k.half(), k.float())
    )
    exact = (q.half().double() * k.float().double()).sum(dim=1).mean().item()
    assert abs(kept.item() - exact) < 1e-7 < abs(rounded.item() - exact)
