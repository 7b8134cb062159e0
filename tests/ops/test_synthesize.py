"""The synthetic negatives, materialised: rebuilt from parents, coefficients and noise by the table of the paper."""

from typing import Any

import pytest
import torch
from torch import Tensor

from synco_fast.ops import KINDS, HardNegatives, synthesize
from tests.ops import oracle
from tests.ops.cases import SETTINGS, alone, batch, everything, with_n_hard

every_setting = pytest.mark.parametrize("hard", SETTINGS.values(), ids=SETTINGS.keys())
PLACE = {"seed": 2**35 + 1, "step": 3, "row_offset": 7}


@every_setting
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_shapes_norms_and_logits(hard: HardNegatives, dtype: torch.dtype) -> None:
    q, _, queue = batch(seed=50)
    q, queue = q.to(dtype), queue.to(dtype)
    sets = synthesize(q, queue, hard=hard, **PLACE)
    wide = torch.promote_types(dtype, torch.float32)
    assert tuple(sets) == hard.kinds
    for kind, made in sets.items():
        samples = hard.count(kind)
        assert made.vectors.shape == (5, samples, 16) and made.vectors.dtype == wide
        assert made.logits.shape == made.coefficients.shape == (5, samples)
        assert made.parents.shape == (5, samples, 2 if kind == "mixed" else 1)
        assert made.parents.dtype == torch.int64 and made.logits.dtype == wide
        eps = torch.finfo(wide).eps
        torch.testing.assert_close(made.vectors.norm(dim=-1), torch.ones(5, samples, dtype=wide), rtol=0, atol=4 * eps)
        logits = (q.to(wide)[:, None] * made.vectors).sum(dim=-1)
        torch.testing.assert_close(made.logits, logits, rtol=0, atol=8 * eps)


@every_setting
@pytest.mark.parametrize("n_hard", [1, 5, 40])
def test_parents_and_coefficients(hard: HardNegatives, n_hard: int) -> None:
    q, _, queue = batch(seed=51)
    hard = with_n_hard(hard, n_hard)
    chosen = [oracle.hard_set(row, n_hard) for row in (q @ queue.T).tolist()]
    for kind, made in synthesize(q, queue, hard=hard, **PLACE).items():
        low, high = oracle.coefficient_range(kind, hard)
        assert ((made.coefficients >= low) & (made.coefficients <= high)).all()
        for row, parents in enumerate(made.parents.flatten(1).tolist()):
            assert set(parents) <= set(chosen[row])


@pytest.mark.parametrize("form", ["query", "negative"])
def test_vectors_are_the_table(form: Any) -> None:
    """In tensors, from each set's own parents and coefficients; the noise from the oracle's Philox."""
    q, _, queue = batch(seed=52)
    q[:, 0] = 0
    hard = everything(extrapolate_from=form, sigma=0.2, delta=0.3, eta=0.4, alpha_max=0.9, beta_max=2.0)
    sets = synthesize(q, queue, hard=hard, **PLACE)
    n = {kind: queue[made.parents[..., 0]] for kind, made in sets.items()}
    c = {kind: made.coefficients[..., None] for kind, made in sets.items()}
    a = q[:, None]
    start = a if form == "query" else n["extrapolated"]
    expected = {
        "interpolated": c["interpolated"] * a + (1 - c["interpolated"]) * n["interpolated"],
        "extrapolated": start + c["extrapolated"] * (n["extrapolated"] - a),
        "mixed": c["mixed"] * n["mixed"] + (1 - c["mixed"]) * queue[sets["mixed"].parents[..., 1]],
        "noisy": n["noisy"] + 0.2 * _noise(hard, 5, 16),
        "perturbed": n["perturbed"] + 0.3 * a,
        "adversarial": n["adversarial"] + 0.4 * torch.sign(a),
    }
    assert expected.keys() == sets.keys()
    for kind, v in expected.items():
        unit = v / v.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(sets[kind].vectors, unit, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_against_plain_loops(kind: str) -> None:
    q, _, queue = batch(3, 6, 20, seed=53)
    hard = alone(kind, n_hard=7, count=5)
    made = synthesize(q, queue, hard=hard, **PLACE)[kind]
    for i, query in enumerate(q.tolist()):
        chosen = oracle.hard_set((q[i] @ queue.T).tolist(), 7)
        for sample in range(5):
            positions, c, noise = oracle.draw(
                kind, hard, seed=PLACE["seed"], step=3, row=7 + i, sample=sample, n_hard=7, dim=6
            )
            parents = [chosen[position] for position in positions]
            vector = oracle.build(kind, query, queue[parents].tolist(), c, noise, "query")
            assert made.parents[i, sample].tolist() == parents
            assert made.coefficients[i, sample].item() == pytest.approx(c, rel=1e-15)
            assert made.vectors[i, sample].tolist() == pytest.approx(vector, rel=1e-12, abs=1e-13)


def test_without_synthetic_negatives_there_is_nothing() -> None:
    q, _, queue = batch(seed=54)
    assert synthesize(q, queue, hard=HardNegatives.none()) == {}
    assert synthesize(q, queue, hard=HardNegatives(4, 0, 0, 0, 0, 0, 0)) == {}


def test_nothing_carries_a_gradient() -> None:
    q, _, queue = batch(seed=55)
    for made in synthesize(q.requires_grad_(), queue, hard=everything()).values():
        assert not any(tensor.requires_grad for tensor in made)


def test_step_as_a_tensor_is_the_same() -> None:
    q, _, queue = batch(seed=56)
    a = synthesize(q, queue, hard=everything(), step=9)
    b = synthesize(q, queue, hard=everything(), step=torch.tensor(9))
    c = synthesize(q, queue, hard=everything(), step=10)
    for kind in KINDS:
        assert torch.equal(a[kind].vectors, b[kind].vectors)
        assert not torch.equal(a[kind].vectors, c[kind].vectors)


def test_a_vector_that_cancels_is_finite() -> None:
    """n = -q mixed half and half has no direction: it is divided by MIN_NORM, not by nothing."""
    q, _, _ = batch(1, 64, 1, seed=57)
    hard = alone("perturbed", n_hard=1, count=3, delta=1.0)
    for dtype in (torch.float16, torch.float32, torch.float64):
        made = synthesize(q.to(dtype), -q.to(dtype), hard=hard)["perturbed"]
        assert made.vectors.abs().max() < 1e-6 and made.logits.abs().max() < 1e-6


def _noise(hard: HardNegatives, rows: int, dim: int) -> Tensor:
    drawn = [
        [
            oracle.draw("noisy", hard, seed=PLACE["seed"], step=3, row=7 + row, sample=sample, n_hard=1, dim=dim)[2]
            for sample in range(hard.noisy)
        ]
        for row in range(rows)
    ]
    return torch.tensor(drawn, dtype=torch.float64)
