"""The draws: each against its stated distribution, and what they may and may not depend on."""

import itertools
import random

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from synco_fast.ops import KINDS, HardNegatives
from synco_fast.ops.draws import Draws, draw
from tests.ops import oracle

# The seeds are fixed, so a test gives the same p value every time: it passes always or never.
SMALLEST_P = 1e-3
SAMPLED = ("interpolated", "extrapolated", "mixed")
MANY = HardNegatives(1024, *[256] * 6)


def drawn(
    kind: str,
    hard: HardNegatives = MANY,
    *,
    rows: int | Tensor = 64,
    n_hard: int | Tensor = 1024,
    dim: int = 4,
    seed: int = 0,
    step: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Draws:
    rows = torch.arange(rows) if isinstance(rows, int) else rows
    like = torch.empty(len(rows), dim, dtype=dtype)
    return draw(kind, hard, seed=seed, step=torch.tensor(step), rows=rows, n_hard=n_hard, like=like)


@pytest.mark.parametrize(
    "changes", [{}, {"alpha_max": 0.9, "beta_max": 3.0, "gamma_max": 0.25}], ids=["paper", "other"]
)
@pytest.mark.parametrize("kind", SAMPLED)
def test_coefficients_are_uniform_on_their_interval(kind: str, changes: dict[str, float]) -> None:
    low, high = {"interpolated": (0, 0.5), "extrapolated": (1, 1.5), "mixed": (0, 1)}[kind]
    if changes:
        low, high = {"interpolated": (0, 0.9), "extrapolated": (1, 3), "mixed": (0, 0.25)}[kind]
    values = drawn(kind, HardNegatives(1024, *[256] * 6, **changes)).coefficients.flatten().numpy()
    assert values.min() >= low and values.max() <= high
    assert stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > SMALLEST_P


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_other_kinds_have_a_constant(dtype: torch.dtype) -> None:
    hard = HardNegatives(8, *[3] * 6, sigma=0.03, delta=0.07, eta=0.2)
    for kind, value in (("noisy", 0.03), ("perturbed", 0.07), ("adversarial", 0.2)):
        expected = torch.full((64, 3), value, dtype=dtype)
        assert torch.equal(drawn(kind, hard, dtype=dtype).coefficients, expected)


@pytest.mark.parametrize("n", [2, 7, 1000, 1024])
@pytest.mark.parametrize("kind", KINDS)
def test_parents_are_uniform_on_the_hard_set(kind: str, n: int) -> None:
    parents = drawn(kind, n_hard=n).parents
    assert parents.shape == (64, 256, 2 if kind == "mixed" else 1) and parents.dtype == torch.int64
    for parent in parents.unbind(-1):
        counts = np.bincount(parent.flatten().numpy(), minlength=n)
        assert len(counts) == n
        assert stats.chisquare(counts).pvalue > SMALLEST_P


def test_the_parents_of_a_mixture_are_independent() -> None:
    """With replacement: all 49 pairs are alike, a row with itself among them."""
    first, second = drawn("mixed", n_hard=7).parents.unbind(-1)
    assert stats.chisquare(np.bincount((7 * first + second).flatten().numpy(), minlength=49)).pvalue > SMALLEST_P


@pytest.mark.parametrize("kind", KINDS)
def test_parents_and_coefficient_are_independent(kind: str) -> None:
    draws = drawn(kind)
    values = [*draws.parents.unbind(-1), *([draws.coefficients] if kind in SAMPLED else [])]
    for a, b in itertools.combinations(values, 2):
        assert _correlation(a, b) < 4.5


def test_each_row_has_its_own_hard_set_size() -> None:
    sizes = torch.tensor([[1], [3], [10]])
    parents = drawn("noisy", rows=3, n_hard=sizes).parents[..., 0]
    assert parents.amax(dim=1).tolist() == [0, 2, 9] and parents.amin().item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_is_standard_normal_element_by_element(dtype: torch.dtype) -> None:
    noise = drawn("noisy", dim=10, dtype=dtype).noise
    assert noise is not None and noise.shape == (64, 256, 10) and noise.dtype == dtype
    for element in noise.double().flatten(0, 1).unbind(1):
        assert stats.kstest(element.numpy(), "norm").pvalue > SMALLEST_P


def test_noise_elements_are_uncorrelated() -> None:
    """Also their squares: the two halves of a Box-Muller pair share a radius."""
    noise = drawn("noisy", dim=10).noise
    assert noise is not None
    elements = noise.flatten(0, 1).unbind(1)
    for a, b in itertools.combinations(elements, 2):
        assert _correlation(a, b) < 4.5
        assert _correlation(a.square(), b.square()) < 4.5


def test_only_the_noisy_kind_has_noise() -> None:
    assert [kind for kind in KINDS if drawn(kind, rows=2).noise is not None] == ["noisy"]


@pytest.mark.parametrize("kind", KINDS)
def test_draws_follow_the_counter_layout(kind: str) -> None:
    """Word by word against plain Python, at random points and at the ends of the 32-bit words."""
    rng = random.Random(kind)
    hard = HardNegatives(1024, *[5] * 6, alpha_max=0.7, beta_max=1.2, gamma_max=0.9)
    for seed, step, row, n_hard in (
        (0, 0, 0, 1024),
        (2**63 - 1, 2**32 - 1, 2**32 - 2, 3),
        *((rng.randrange(2**63), rng.randrange(10**6), rng.randrange(10**5), rng.randrange(1, 5000)) for _ in range(5)),
    ):
        draws = drawn(kind, hard, rows=row + torch.arange(2), n_hard=n_hard, dim=6, seed=seed, step=step)
        for i, sample in itertools.product(range(2), range(5)):
            parents, coefficient, noise = oracle.draw(
                kind, hard, seed=seed, step=step, row=row + i, sample=sample, n_hard=n_hard, dim=6
            )
            assert draws.parents[i, sample].tolist() == parents
            assert draws.coefficients[i, sample].item() == pytest.approx(coefficient, rel=1e-15)
            if draws.noise is not None:
                assert draws.noise[i, sample].tolist() == pytest.approx(noise, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_draws_do_not_depend_on_how_the_batch_is_split(kind: str) -> None:
    whole = drawn(kind, rows=8, dim=6)
    parts = [drawn(kind, rows=rows, dim=6) for rows in torch.arange(8).split([3, 1, 4])]
    _assert_same(whole, _concatenated(parts))


@pytest.mark.parametrize("kind", KINDS)
def test_draws_do_not_depend_on_the_number_of_samples(kind: str) -> None:
    few = drawn(kind, HardNegatives(1024, *[5] * 6), rows=3, dim=6)
    many = drawn(kind, rows=3, dim=6)
    noise = None if many.noise is None else many.noise[:, :5]
    _assert_same(few, Draws(many.parents[:, :5], many.coefficients[:, :5], noise))


@pytest.mark.parametrize("dim", [1, 2, 3, 4, 5, 7, 13])
def test_noise_does_not_depend_on_the_padding_of_its_dimension(dim: int) -> None:
    narrow, wide = drawn("noisy", rows=2, dim=dim), drawn("noisy", rows=2, dim=16)
    assert narrow.noise is not None and wide.noise is not None and narrow.noise.shape[-1] == dim
    _assert_same(narrow, Draws(wide.parents, wide.coefficients, wide.noise[..., :dim]))


@pytest.mark.parametrize("kind", KINDS)
def test_draws_are_the_same_in_float32(kind: str) -> None:
    wide, narrow = drawn(kind, rows=4, dim=6), drawn(kind, rows=4, dim=6, dtype=torch.float32)
    assert torch.equal(wide.parents, narrow.parents)
    torch.testing.assert_close(narrow.coefficients.double(), wide.coefficients, rtol=2**-23, atol=0)
    if wide.noise is not None and narrow.noise is not None:
        torch.testing.assert_close(narrow.noise.double(), wide.noise, rtol=0, atol=1e-5)


def test_every_part_of_the_counter_and_the_key_matters() -> None:
    """Kinds, samples, rows, steps and seeds (both halves of the key) each give draws of their own, uncorrelated."""
    streams = {
        "base": drawn("mixed"),
        "kind": drawn("interpolated"),
        "step": drawn("mixed", step=1),
        "seed": drawn("mixed", seed=1),
        "seed's high word": drawn("mixed", seed=2**32),
        "rows": drawn("mixed", rows=torch.arange(64, 128)),
    }
    unit = {name: s.coefficients / s.coefficients.max() for name, s in streams.items()}
    unit["samples"] = unit["base"].roll(1, dims=1)
    unit["rows shifted"] = unit["base"].roll(1, dims=0)
    unit["parents"] = streams["base"].parents[..., 0].double()
    for a, b in itertools.combinations(unit, 2):
        assert _correlation(unit[a], unit[b]) < 4.5, (a, b)
    every = torch.cat([unit[name].flatten() for name in streams])
    # 24 random bits: among 98,304 values some 290 pairs meet by chance; a repeated stream would be 16,384.
    assert len(every) - len(every.unique()) < 400


def test_noise_differs_between_samples_rows_steps_seeds_and_blocks() -> None:
    base = drawn("noisy", rows=8, dim=8).noise
    assert base is not None
    others = [drawn("noisy", rows=8, dim=8, step=1).noise, drawn("noisy", rows=8, dim=8, seed=1).noise]
    others += [base.roll(1, dims=0), base.roll(1, dims=1), base.roll(4, dims=2)]
    for other in others:
        assert other is not None and _correlation(base, other) < 4.5


def _correlation(a: Tensor, b: Tensor) -> float:
    """Size of the correlation in standard deviations of what chance gives."""
    stacked = torch.stack([a.double().flatten(), b.double().flatten()])
    return abs(torch.corrcoef(stacked)[0, 1].item()) * stacked.shape[1] ** 0.5


def _concatenated(parts: list[Draws]) -> Draws:
    noise = [part.noise for part in parts if part.noise is not None]
    return Draws(
        torch.cat([part.parents for part in parts]),
        torch.cat([part.coefficients for part in parts]),
        torch.cat(noise) if noise else None,
    )


def _assert_same(a: Draws, b: Draws) -> None:
    assert torch.equal(a.parents, b.parents) and torch.equal(a.coefficients, b.coefficients)
    assert (a.noise is None) == (b.noise is None)
    if a.noise is not None and b.noise is not None:
        assert torch.equal(a.noise, b.noise)
