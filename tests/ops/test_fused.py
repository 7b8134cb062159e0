"""The fused backends against float64 and against `eager` in the same precision.

Rows lie on a grid (`exact_rows`, `grid_rows`), so that no hard set hangs on a rounding and a single wrong parent shows.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from synco_fast.ops import HardNegatives, InfoNCE, backends, infonce
from tests.ops.cases import SETTINGS, everything, exact_rows, grid_rows, rounding_floor, run, with_n_hard
from tests.ops.random_calls import FULL, Case, calls, cases

FUSED = ("cpu",)

every_backend = pytest.mark.parametrize("backend", FUSED)
every_setting = pytest.mark.parametrize("hard", SETTINGS.values(), ids=SETTINGS.keys())
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])


@pytest.mark.parametrize("backend", FUSED)
def test_the_backend_is_there(backend: str) -> None:
    assert backends()[backend] == "ok"


def assert_same_answer(
    backend: str,
    q: Tensor,
    k: Tensor,
    queue: Tensor,
    *,
    hard: HardNegatives,
    temperature: float,
    exact: bool = False,
    **place: int,
) -> None:
    """Ranks identical to float64; loss and gradient off by at most twice what eager is off in the same precision.

    Where not `exact`, a synthetic negative may tie with the positive to the last bit, and fall on either side.
    """
    operands = q.to(queue.dtype).double(), k.double(), queue.double()
    arguments = {"hard": hard, "temperature": temperature, **place}
    truth, true_gradient = run("eager", *operands, **arguments)
    eager, eager_gradient = run("eager", q, k, queue, **arguments)
    out, gradient = run(backend, q, k, queue, **arguments)
    assert torch.equal(out.rank, truth.rank)
    assert out.loss.dtype == torch.float32 and gradient.dtype == q.dtype
    loss_floor, gradient_floor = rounding_floor(temperature, len(q), truth.loss.item())
    loss_error, eager_loss_error = (abs(x.loss.item() - truth.loss.item()) for x in (out, eager))
    assert loss_error <= 2 * eager_loss_error + loss_floor
    error, eager_error = ((x.double() - true_gradient).norm().item() for x in (gradient, eager_gradient))
    assert error <= 2 * eager_error + gradient_floor
    assert (out.rank_all - truth.rank_all).abs().max() <= (0 if exact else 1)
    assert out.stats.keys() == truth.stats.keys()
    for name, value in truth.stats.items():
        assert abs(float(out.stats[name] - value)) <= 4 * rounding_floor(temperature, len(q))[0], name


@every_backend
@settings(max_examples=cases(100), deadline=None, derandomize=not FULL)
@given(case=calls())
def test_random_calls(backend: str, case: Case) -> None:
    assert_same_answer(backend, *case.operands(), **case.arguments)


@every_backend
@every_setting
@every_dtype
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("n_hard", [1, 37, 300])
def test_exact_arithmetic(backend: str, hard: HardNegatives, dtype: torch.dtype, dim: int, n_hard: int) -> None:
    """Full of ties, at the threshold and with the positive; n_hard = 300 is the whole queue."""
    q, queue, k = exact_rows(6, dim, seed=36), exact_rows(300, dim, seed=37), exact_rows(6, dim, seed=38)
    hard = with_n_hard(hard, n_hard)
    place = {"seed": 4, "step": 5, "row_offset": 6}
    assert_same_answer(backend, q.float(), k.float(), queue.to(dtype), hard=hard, temperature=0.2, exact=True, **place)


@every_backend
@every_setting
@pytest.mark.parametrize("n_hard", [100, 2000])
def test_a_collapsed_queue(backend: str, hard: HardNegatives, n_hard: int) -> None:
    """Thousands of ties; with the query among them, every parent is the query."""
    q, k = exact_rows(5, 64, seed=39), exact_rows(5, 64, seed=40)
    rows = torch.cat([q[:1].expand(1500, 64), exact_rows(1, 64, seed=41).expand(1700, 64)])
    assert_same_answer(backend, q.float(), k.float(), rows.float(), hard=with_n_hard(hard, n_hard), temperature=0.07)


@every_backend
@every_dtype
def test_vectors_that_all_but_cancel(backend: str, dtype: torch.dtype) -> None:
    """Parents that are the query's opposite: a length^2 is then a difference, and clamped."""
    q = exact_rows(4, 64, seed=42)
    hard = replace(everything(2), interpolated=64, mixed=64, perturbed=64, delta=1.0)
    out, gradient = run(backend, q.float(), q.float(), torch.cat([-q, q]).to(dtype), hard=hard, temperature=0.2)
    truth, true_gradient = run("reference", q, q, torch.cat([-q, q]), hard=hard, temperature=0.2)
    loss_floor, gradient_floor = rounding_floor(0.2, 4)
    # As in test_precision: dividing by a length of at least MIN_NORM multiplies a rounding by 100 on average.
    assert abs(out.loss.item() - truth.loss.item()) <= 100 * loss_floor
    assert (gradient - true_gradient).norm() <= 100 * 4 * gradient_floor


@every_backend
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_ties_between_parts_of_the_queue_that_run_side_by_side(backend: str, threads: int) -> None:
    """Rows that tie for each query and differ where queries are 0: the gradient tells which were taken, the lowest.

    Those of the first part come late, when another part has long been full of its own.
    """
    q = torch.cat([exact_rows(130, 64, seed=51), torch.zeros(130, 64)], dim=1)
    queue = torch.cat([exact_rows(1, 64, seed=52).expand(20_000, 64), exact_rows(20_000, 64, seed=53)], dim=1) / 2
    queue[:4000, :64] *= -1
    q *= (q @ queue[-1:].T).sign()
    k = exact_rows(130, 128, seed=54)
    torch.set_num_threads(threads)
    try:
        assert_same_answer(backend, q.float(), k.float(), queue.float(), hard=HardNegatives.synco(), temperature=0.07)
    finally:
        torch.set_num_threads(1)


def full_size(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    q, queue = grid_rows(130, 128, seed=43).float(), grid_rows(9000, 128, seed=44).to(dtype)
    return q, grid_rows(130, 128, seed=45).float(), queue


def assert_identical(one: tuple[InfoNCE, Tensor], other: tuple[InfoNCE, Tensor]) -> None:
    assert torch.equal(one[1], other[1])
    for a, b in zip(one[0][:3], other[0][:3], strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(value, other[0].stats[name]) for name, value in one[0].stats.items())


@every_backend
@every_dtype
def test_two_runs_and_any_number_of_threads_give_the_same_bits(backend: str, dtype: torch.dtype) -> None:
    q, k, queue = full_size(dtype)
    results = []
    for threads in (1, 1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(backend, q, k, queue, hard=HardNegatives.synco(), temperature=0.07))
    torch.set_num_threads(1)
    for other in results[1:]:
        assert_identical(results[0], other)


@every_backend
@every_dtype
def test_what_lies_around_the_rows_never_leaks(backend: str, dtype: torch.dtype) -> None:
    """The operands as views into NaN: strided, and with rows before and after."""
    tensors = full_size(dtype)
    views = []
    for tensor in tensors:
        rows, dim = tensor.shape
        poisoned = torch.full((rows + 7, dim + 8), torch.nan, dtype=tensor.dtype)
        poisoned[3 : rows + 3, 4 : dim + 4] = tensor
        views.append(poisoned[3 : rows + 3, 4 : dim + 4])
    hard = HardNegatives.synco()
    plain, poisoned_result = (run(backend, q, k, queue, hard=hard, temperature=0.2) for q, k, queue in (tensors, views))
    assert_identical(plain, poisoned_result)


@every_backend
@pytest.mark.parametrize("hard", [SETTINGS["none"], everything(50)], ids=["none", "all"])
def test_nan_in_the_queue_is_a_nan_loss_and_no_crash(backend: str, hard: HardNegatives) -> None:
    q, k, queue = full_size()
    queue[17, 3] = torch.nan
    assert infonce(q, k, queue, hard=hard, backend=backend).loss.isnan()
    queue[:] = torch.nan
    assert infonce(q, k, queue, hard=hard, backend=backend).loss.isnan()


@every_backend
def test_rows_far_from_unit_length_give_no_number(backend: str) -> None:
    """exp(9 / 0.02) is beyond float32: an infinite loss or NaN, and not something that looks like one."""
    q, k, queue = full_size()
    queue[5] = q[0]
    assert not infonce(3 * q, k, 3 * queue, hard=everything(50), temperature=0.02, backend=backend).loss.isfinite()


@every_backend
@every_dtype
@pytest.mark.parametrize("setting", ["default dtype", "without oneDNN"])
def test_settings_of_torch_change_nothing(backend: str, dtype: torch.dtype, setting: str) -> None:
    q, k, queue = full_size(dtype)
    expected, expected_gradient = run(backend, q, k, queue, hard=everything(50), temperature=0.2)
    if setting == "default dtype":
        torch.set_default_dtype(torch.float64)
    try:
        with torch.backends.mkldnn.flags(enabled=setting != "without oneDNN"):
            out, gradient = run(backend, q, k, queue, hard=everything(50), temperature=0.2)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(out.rank, expected.rank) and torch.equal(out.rank_all, expected.rank_all)
    # Without oneDNN another product may sum in another order.
    loss_floor, gradient_floor = rounding_floor(0.2, len(q), expected.loss.item())
    assert abs(out.loss.item() - expected.loss.item()) <= loss_floor
    assert (gradient - expected_gradient).norm() <= gradient_floor


@every_backend
@pytest.mark.parametrize("q_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_dtype_of_q_and_k(backend: str, q_dtype: torch.dtype) -> None:
    q, k, queue = (x.to(torch.bfloat16) for x in full_size())
    expected, expected_gradient = run(backend, q.float(), k.float(), queue, hard=everything(50))
    out, gradient = run(backend, q.to(q_dtype), k.to(q_dtype), queue, hard=everything(50))
    assert torch.equal(out.loss, expected.loss) and torch.equal(gradient, expected_gradient.to(q_dtype))


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [1, 2, 3, 20, 65, 300])
def test_odd_widths(backend: str, dim: int, dtype: torch.dtype) -> None:
    q, k, queue = (grid_rows(rows, dim, seed=46 + rows, bits=8) for rows in (3, 4, 300))
    assert_same_answer(backend, q.float(), k[:3].float(), queue.to(dtype), hard=everything(40), temperature=0.2)


@every_backend
def test_what_it_does_not_take_is_named(backend: str) -> None:
    q, k, queue = full_size()
    hard, labels = HardNegatives.none(), {"labels": torch.zeros(130, dtype=torch.int64)}
    with pytest.raises(ValueError, match=f"backend {backend} .*queue must be float16, .*, got torch.float64"):
        infonce(q, k, queue.double(), hard=hard, backend=backend)
    with pytest.raises(ValueError, match=f"backend {backend} .*temperature must be at least 0.02, got 0.019"):
        infonce(q, k, queue, hard=hard, backend=backend, temperature=0.019)
    with pytest.raises(ValueError, match=f"backend {backend} .*no class oracle"):
        infonce(q, k, queue, hard=hard, backend=backend, **labels, queue_labels=torch.zeros(9000, dtype=torch.int64))


@every_backend
@pytest.mark.parametrize("hard", [SETTINGS["none"], everything(50)], ids=["none", "all"])
def test_compiles_to_the_same_answer(backend: str, hard: HardNegatives) -> None:
    q, k, queue = full_size()

    def loss(q: Tensor) -> Tensor:
        return infonce(q, k, queue, hard=hard, backend=backend).loss * 2

    gradients = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        leaf = q.clone().requires_grad_()
        function(leaf).backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)
