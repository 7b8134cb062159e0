"""The loss and its gradient in float64: reference against eager, and both against oracles of our own.

Low precision is in test_precision.py, the torch.library side in test_operator.py.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from synco_fast.ops import KINDS, HardNegatives, InfoNCE, infonce, stat_names, synthesize
from tests.ops import oracle
from tests.ops.cases import BACKENDS, SETTINGS, alone, batch, everything, run, with_n_hard

FROM_QUERY = ("interpolated", "extrapolated", "perturbed", "adversarial")
both = pytest.mark.parametrize("backend", BACKENDS)
every_setting = pytest.mark.parametrize("hard", SETTINGS.values(), ids=SETTINGS.keys())


def close(actual: Any, expected: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def assert_agree(q: Tensor, k: Tensor, queue: Tensor, **arguments: Any) -> tuple[InfoNCE, Tensor]:
    """Both backends give one answer; it is returned."""
    (a, grad_a), (b, grad_b) = (run(backend, q, k, queue, **arguments) for backend in BACKENDS)
    assert torch.isfinite(a.loss) and torch.isfinite(grad_a).all()
    close(b.loss, a.loss)
    # Per unit of the gradient's natural size, 1 / (B t).
    natural = 1 / (len(q) * arguments.get("temperature", 0.2))
    close(grad_b / natural, grad_a / natural)
    assert torch.equal(a.rank, b.rank) and torch.equal(a.rank_all, b.rank_all)
    assert a.stats.keys() == b.stats.keys()
    for name in a.stats:
        close(b.stats[name], a.stats[name], 1e-6)
    return a, grad_a


# ---------------------------------------------------------------- reference against eager


@every_setting
@pytest.mark.parametrize("temperature", [0.02, 0.07, 0.2, 1.0])
def test_backends_agree(hard: HardNegatives, temperature: float) -> None:
    assert_agree(*batch(), hard=hard, temperature=temperature, seed=5, step=7, row_offset=11)


@every_setting
@pytest.mark.parametrize("n_hard", [1, 2, 39, 40])
def test_backends_agree_on_any_hard_set(hard: HardNegatives, n_hard: int) -> None:
    assert_agree(*batch(seed=1), hard=with_n_hard(hard, n_hard))


@pytest.mark.parametrize(
    ("rows", "dim", "queue_rows"),
    [(1, 1, 1), (1, 2, 3), (3, 1, 7), (2, 5, 1), (7, 3, 33), (4, 33, 65), (9, 130, 129)],
)
@pytest.mark.parametrize(
    "hard", [SETTINGS["none"], everything(), SETTINGS["all, strong"]], ids=["none", "all", "strong"]
)
def test_backends_agree_on_odd_shapes(hard: HardNegatives, rows: int, dim: int, queue_rows: int) -> None:
    q, k, queue = batch(rows, dim, queue_rows, seed=2)
    # In one dimension every unit row is +-1 and the positive would tie with half of the negatives.
    assert_agree(q, 0.9 * k, queue, hard=with_n_hard(hard, min(12, queue_rows)))


@every_setting
def test_backends_agree_on_a_collapsed_queue(hard: HardNegatives) -> None:
    q, k, queue = batch(seed=3)
    assert_agree(q, k, queue[:1].expand_as(queue).clone(), hard=hard)


@every_setting
@pytest.mark.parametrize("temperature", [0.02, 0.2])
def test_backends_agree_where_negatives_are_the_query_or_its_opposite(hard: HardNegatives, temperature: float) -> None:
    q, k, queue = batch(seed=4)
    queue[:10] = torch.cat([q, -q])
    assert_agree(q, k, queue, hard=hard, temperature=temperature)
    out, _ = assert_agree(q, k, torch.cat([q[:1], -q[:1]]), hard=with_n_hard(hard, 2), temperature=temperature)
    assert out.rank[0] == 1, "the queue's copy of q is above the positive"


@pytest.mark.parametrize(
    "hard", [alone("perturbed", 1, delta=1.0), alone("interpolated", 1, 1000, alpha_max=1.0)], ids=["all", "some"]
)
def test_backends_agree_on_vectors_shorter_than_the_least_length(hard: HardNegatives) -> None:
    """Parents opposite to the query: all of the vectors cancel, or those with a coefficient next to a half."""
    q, k, _ = batch(1, seed=4)
    (made,) = synthesize(q, -q, hard=hard).values()
    shorter = made.vectors.norm(dim=-1) < 1 - 1e-6
    assert shorter.any() and shorter.all() == (hard.perturbed > 0)
    (a, grad_a), (b, grad_b) = (run(backend, q, k, -q, hard=hard) for backend in BACKENDS)
    # Up to the rounding of r^2, which counts 1 / MIN_NORM^2 = 10^4 times.
    close(b.loss, a.loss, 1e-10)
    close(grad_b, grad_a, 1e-10)


@every_setting
def test_backends_agree_on_rows_that_are_not_of_unit_length(hard: HardNegatives) -> None:
    """Lengths come from the rows themselves, so that rounded rows are exact too."""
    q, k, queue = batch(seed=5)
    lengths = torch.linspace(0.5, 2.0, 40, dtype=torch.float64)[:, None]
    assert_agree(q * lengths[::8], k * lengths[:5], queue * lengths.flip(0), hard=hard)


@every_setting
def test_backends_agree_under_the_class_oracle(hard: HardNegatives) -> None:
    q, k, queue = batch(seed=6)
    thirds = torch.arange(40) % 3
    assert_agree(q, k, queue, hard=hard, labels=torch.tensor([0, 1, 9, 1, 2]), queue_labels=thirds)

    # Rows 1 and 3 keep three negatives, fewer than n_hard.
    few = torch.where(torch.arange(40) < 3, 0, 1)
    out, _ = assert_agree(q, k, queue, hard=hard, labels=torch.tensor([0, 1, 9, 1, 2]), queue_labels=few)
    assert out.loss > 0

    # Rows 1 and 3 keep none: only the positive is left, with loss 0 and no gradient.
    labels, queue_labels = torch.tensor([0, 1, 9, 1, 2]), torch.ones(40, dtype=torch.int64)
    out, gradient = assert_agree(q, k, queue, hard=hard, labels=labels, queue_labels=queue_labels)
    assert torch.isfinite(gradient).all() and gradient.abs().sum(dim=1)[[0, 2, 4]].min() > 1e-3
    close(gradient[[1, 3]], torch.zeros(2, 16, dtype=torch.float64), 1e-15)
    assert not out.rank_all[[1, 3]].any()


def test_exact_zeros_in_the_query() -> None:
    """sign(0) = 0: those elements of an adversarial vector stay as they are."""
    q, k, queue = batch(seed=7)
    q[:, ::3] = 0
    q[0, 1] = -0.0
    assert_agree(q, k, queue, hard=alone("adversarial", eta=0.5))


def test_inputs_that_are_not_contiguous() -> None:
    q, k, queue = batch(seed=8)
    hard = everything()
    expected, gradient = run("eager", q, k, queue, hard=hard)
    for backend in BACKENDS:
        leaf = q.T.contiguous().T.requires_grad_()
        out = infonce(leaf, k.T.contiguous().T, queue.repeat(1, 2)[:, :16], hard=hard, backend=backend)
        out.loss.backward()
        close(out.loss, expected.loss)
        close(leaf.grad, gradient)
        assert torch.equal(out.rank_all, expected.rank_all)


# ---------------------------------------------------------------- oracles written by hand


@both
@pytest.mark.parametrize("form", ["query", "negative"])
@pytest.mark.parametrize("temperature", [0.02, 0.2])
@pytest.mark.parametrize("classes", [False, True])
def test_against_plain_loops(backend: str, form: Any, temperature: float, classes: bool) -> None:
    q, k, queue = batch(4, 6, 9, seed=9, noise=2.0)
    hard = HardNegatives(4, 3, 2, 3, 2, 2, 2, 0.4, 1.7, 0.8, 0.2, 0.3, 0.25, form)
    # Row 0 keeps every negative, rows 1 and 3 fewer than n_hard, row 2 all but two.
    labels, queue_labels = ([5, 1, 2, 1], [1, 1, 1, 1, 2, 1, 1, 2, 3]) if classes else (None, None)
    arguments = {"seed": 2**40 + 3, "step": 12, "row_offset": 5}
    expected = oracle.infonce(
        q.tolist(),
        k.tolist(),
        queue.tolist(),
        hard,
        temperature,
        **arguments,
        labels=labels,
        queue_labels=queue_labels,
    )
    as_tensors = {
        name: value if value is None else torch.tensor(value)
        for name, value in (("labels", labels), ("queue_labels", queue_labels))
    }
    out, gradient = run(backend, q, k, queue, hard=hard, temperature=temperature, **arguments, **as_tensors)
    close(out.loss.item(), expected.loss)
    close(gradient, torch.tensor(expected.gradient, dtype=torch.float64), 1e-12 / temperature)
    assert out.rank.tolist() == expected.rank and out.rank_all.tolist() == expected.rank_all
    assert out.stats.keys() == expected.stats.keys()
    for name, value in expected.stats.items():
        assert out.stats[name].item() == pytest.approx(value, abs=1e-6), name


@both
@pytest.mark.parametrize("hard", [SETTINGS["none"], alone("mixed"), alone("noisy")], ids=["none", "mixed", "noisy"])
def test_gradcheck(backend: str, hard: HardNegatives) -> None:
    """The kinds that are not built from q, so that their frozen vectors are the same at every q."""
    q, k, queue = batch(3, 6, 20, seed=10)
    q.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda q: infonce(q, k, queue, hard=hard, temperature=0.2, backend=backend).loss,
        (q,),
        atol=1e-7,
        rtol=1e-6,
    )


@both
@pytest.mark.parametrize(
    "hard",
    [*(alone(kind) for kind in FROM_QUERY), alone("extrapolated", extrapolate_from="negative"), everything()],
    ids=[*FROM_QUERY, "extrapolated from the negative", "all"],
)
def test_gradient_is_that_of_frozen_vectors(backend: str, hard: HardNegatives) -> None:
    """Built at q and kept there: the gradient is the finite difference of that loss, and its autograd to 1e-12."""
    q, k, queue = batch(3, 6, 20, seed=11)
    vectors = torch.cat([s.vectors for s in synthesize(q, queue, hard=hard, seed=3).values()], dim=1)
    out, gradient = run(backend, q, k, queue, hard=hard, seed=3)

    leaf = q.clone().requires_grad_()
    loss = oracle.frozen_loss(leaf, k, queue, vectors, 0.2)
    loss.backward()
    close(out.loss.detach(), loss.detach())
    close(gradient, leaf.grad)

    h = 1e-5
    differences = torch.empty_like(q)
    for i in range(q.numel()):
        step = torch.zeros(q.numel(), dtype=torch.float64).index_fill_(0, torch.tensor(i), h).view_as(q)
        up, down = (oracle.frozen_loss(at, k, queue, vectors, 0.2) for at in (q + step, q - step))
        differences.view(-1)[i] = (up - down) / (2 * h)
    close(gradient, differences, 1e-8)


@both
def test_construction_carries_no_gradient(backend: str) -> None:
    """The two differ: were gradient to flow through the construction, the test above would be asking for it."""
    q, k, queue = batch(3, 6, 20, seed=11)
    hard = alone("interpolated", alpha_max=1.0, count=20)
    _, gradient = run(backend, q, k, queue, hard=hard)
    h = 1e-5
    moved = q.clone()
    moved[0, 0] += h
    up, down = (infonce(at, k, queue, hard=hard, backend=backend).loss for at in (moved, q - (moved - q)))
    assert abs((up - down).item() / (2 * h) - gradient[0, 0].item()) > 1e-3


@both
def test_no_gradient_flows_to_keys_and_queue(backend: str) -> None:
    q, k, queue = (x.requires_grad_() for x in batch(seed=12))
    infonce(q, k, queue, hard=everything(), backend=backend).loss.backward()
    assert q.grad is not None and k.grad is None
    assert queue.grad is None


@both
def test_backward_scales_and_repeats(backend: str) -> None:
    q, k, queue = batch(seed=13)
    _, gradient = run(backend, q, k, queue, hard=everything())
    leaf = q.clone().requires_grad_()
    loss = infonce(2 * leaf, 0.5 * k, queue, hard=everything(), backend=backend).loss
    doubled = run(backend, 2 * q, 0.5 * k, queue, hard=everything())[1]
    (first,) = torch.autograd.grad(-3 * loss, leaf, retain_graph=True)
    (second,) = torch.autograd.grad(loss, leaf)
    close(first, -6 * doubled)
    close(second, 2 * doubled)
    assert not torch.allclose(gradient, doubled)


# ---------------------------------------------------------------- what the result says


@both
@every_setting
def test_stats(backend: str, hard: HardNegatives) -> None:
    q, k, queue = batch(8, 16, 40, seed=14, noise=2.0)
    out, _ = run(backend, q, k, queue, hard=hard)
    assert tuple(out.stats) == stat_names(hard)
    for value in out.stats.values():
        assert value.shape == () and value.dtype == torch.float32 and not value.requires_grad
    masses = {name: value for name, value in out.stats.items() if name.startswith("mass_")}
    assert masses.keys() == {f"mass_{group}" for group in ("positive", "queue", *hard.kinds)}
    assert all(value > 0 for value in masses.values())
    assert sum(masses.values()).item() == pytest.approx(1, abs=1e-6)
    assert 0 < out.stats["acc1"] < out.stats["acc5"] < 1, "a case that tells them apart"
    assert out.stats["acc1"] == (out.rank < 1).float().mean()
    assert out.stats["acc5"] == (out.rank < 5).float().mean()
    assert out.stats["positive_similarity"].item() == pytest.approx((q * k).sum(1).mean().item(), abs=1e-6)
    if hard.total:
        share = sum(masses[f"mass_{kind}"] for kind in hard.kinds)
        assert out.stats["synthetic_share"].item() == pytest.approx(share.item(), abs=1e-6)
        hardest = (q @ queue.T).topk(hard.n_hard, dim=1).values.mean().item()
        assert out.stats["hard_similarity"].item() == pytest.approx(hardest, abs=1e-6)


@both
@every_setting
def test_ranks_count_what_scores_at_or_above_the_positive(backend: str, hard: HardNegatives) -> None:
    q, k, queue = batch(8, 16, 40, seed=14, noise=2.0)
    out, _ = run(backend, q, k, queue, hard=hard)
    positive = (q * k).sum(dim=1, keepdim=True)
    synthetic = [s.logits for s in synthesize(q, queue, hard=hard).values()]
    rank = (q @ queue.T >= positive).sum(dim=1)
    assert 0 < rank.sum() < 8 * 40
    assert out.rank.dtype == out.rank_all.dtype == torch.int64
    assert torch.equal(out.rank, rank)
    assert torch.equal(out.rank_all, rank + sum(((s >= positive).sum(dim=1) for s in synthetic), start=0))


@both
def test_accuracies_are_of_ranks_below_1_and_5(backend: str) -> None:
    """Ten negatives at 0.0 to 0.9, and a key above all, below one, below four, below five, below all of them."""
    queue = torch.zeros(10, 2)
    queue[:, 0] = torch.arange(10) / 10
    k = torch.tensor([[0.95, 0], [0.85, 0], [0.55, 0], [0.45, 0], [-0.05, 0]])
    q = torch.tensor([[1.0, 0]]).expand(5, 2)
    out = infonce(q, k, queue, hard=HardNegatives.none(), backend=backend)
    assert out.rank.tolist() == out.rank_all.tolist() == [0, 1, 4, 5, 10]
    assert out.stats["acc1"].item() == pytest.approx(1 / 5) and out.stats["acc5"].item() == pytest.approx(3 / 5)


@both
def test_rank_tells_neighbouring_floats_apart(backend: str) -> None:
    """A negative one step below the positive is below it, whatever dividing by the temperature rounds to."""
    positive = torch.linspace(0.5, 1, 200)
    below = torch.nextafter(positive, torch.tensor(0.0))
    for temperature in (0.07, 0.2):
        for high, low in zip(positive.tolist(), below.tolist(), strict=True):
            q, k = torch.tensor([[1.0, 0.0]]), torch.tensor([[high, 0.0]])
            queue = torch.tensor([[low, 0.0], [high, 0.0]])
            out = infonce(q, k, queue, hard=HardNegatives.none(), temperature=temperature, backend=backend)
            assert out.rank.item() == 1, (temperature, high)


@both
def test_result_is_a_function_of_seed_step_and_global_row(backend: str) -> None:
    q, k, queue = batch(6, seed=15)
    base = {"hard": everything(), "seed": 1, "step": 2, "row_offset": 3}
    out, gradient = run(backend, q, k, queue, **base)
    again, gradient_again = run(backend, q, k, queue, **base)
    assert torch.equal(out.loss, again.loss) and torch.equal(gradient, gradient_again)
    for change in ({"seed": 2}, {"step": 3}, {"row_offset": 4}, {"seed": 1 + 2**32}):
        assert run(backend, q, k, queue, **base | change)[0].loss != out.loss, change


@both
def test_step_as_a_tensor_is_the_same(backend: str) -> None:
    q, k, queue = batch(seed=16)
    for step in (0, 41, 2**31 + 1):
        a, grad_a = run(backend, q, k, queue, hard=everything(), step=step)
        for tensor in (torch.tensor(step), torch.tensor([step])):
            b, grad_b = run(backend, q, k, queue, hard=everything(), step=tensor)
            assert torch.equal(a.loss, b.loss) and torch.equal(grad_a, grad_b)


@both
def test_batch_split_over_ranks(backend: str) -> None:
    """Two halves with their row_offset: the mean of the losses, half of each gradient, the same ranks."""
    q, k, queue = batch(7, seed=17)
    whole, gradient = run(backend, q, k, queue, hard=everything(), row_offset=100)
    parts = [
        run(backend, q[rows], k[rows], queue, hard=everything(), row_offset=100 + rows.start)
        for rows in (slice(0, 3), slice(3, 7))
    ]
    close((3 * parts[0][0].loss + 4 * parts[1][0].loss) / 7, whole.loss)
    close(torch.cat([parts[0][1] * 3 / 7, parts[1][1] * 4 / 7]), gradient)
    assert torch.equal(torch.cat([out.rank_all for out, _ in parts]), whole.rank_all)


@both
@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_the_same_with_and_without_the_others(backend: str, kind: str) -> None:
    """Its weight relative to the positive's; a single query, since the statistics are means over the batch."""
    q, k, queue = batch(1, seed=18)
    together = infonce(q, k, queue, hard=everything(), backend=backend).stats
    only = infonce(q, k, queue, hard=alone(kind, count=everything().count(kind)), backend=backend).stats
    weights = [stats[f"mass_{kind}"] / stats["mass_positive"] for stats in (only, together)]
    close(weights[0], weights[1], 1e-5)
    assert together["mass_positive"] < only["mass_positive"]


@both
def test_class_oracle_equals_taking_the_rows_out(backend: str) -> None:
    """For one query, same-class negatives in the queue or not in it at all: one loss, one gradient, one rank."""
    q, k, queue = batch(1, seed=19)
    for kept in (40, 25, 12, 7, 1):
        queue_labels = torch.ones(40, dtype=torch.int64)
        queue_labels[torch.randperm(40, generator=torch.Generator().manual_seed(kept))[:kept]] = 2
        hard = everything()
        out, gradient = run(backend, q, k, queue, hard=hard, labels=torch.tensor([1]), queue_labels=queue_labels)
        rest = queue[queue_labels == 2]
        expected, expected_gradient = run(backend, q, k, rest, hard=replace(hard, n_hard=min(hard.n_hard, len(rest))))
        close(out.loss, expected.loss)
        close(gradient, expected_gradient)
        assert out.rank == expected.rank and out.rank_all == expected.rank_all
        for name, value in expected.stats.items():
            close(out.stats[name], value, 1e-6)


@both
def test_inputs_are_left_alone(backend: str) -> None:
    inputs = batch(seed=21)
    before = [x.clone() for x in inputs]
    run(backend, *inputs, hard=everything())
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@both
def test_a_query_needs_no_gradient(backend: str) -> None:
    q, k, queue = batch(seed=22)
    out = infonce(q, k, queue, hard=everything(), backend=backend)
    assert not out.loss.requires_grad
    assert torch.equal(out.loss, run(backend, q, k, queue, hard=everything())[0].loss)
