"""Numbers of an embedding against their formulas, pair by pair, in float64."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from synco_fast.evaluation.embedding import (
    BIN,
    Similarities,
    alignment,
    powers,
    principal_components,
    same_class_among,
    uniformity,
)

CPU = torch.device("cpu")


def unit(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=-1)


@pytest.mark.parametrize("n", [2, 5, 1100], ids=["one pair", "a few", "three blocks"])
def test_alignment_and_uniformity_by_brute_force(n: int) -> None:
    """Sums of n^2 / 2 terms below 1 in another order, each from a distance that cancels: 1e-12 is thousands of eps."""
    x, y = unit(n, 8, seed=0), unit(n, 8, seed=1)
    rows, others = x.double().numpy(), y.double().numpy()
    assert alignment(x, y) == pytest.approx(np.mean([np.sum((a - b) ** 2) for a, b in zip(rows, others, strict=True)]))
    potentials = [np.exp(-2 * np.sum((rows[i] - rows[i + 1 :]) ** 2, axis=1)) for i in range(n - 1)]
    expected = math.log(math.fsum(np.concatenate(potentials)) / (n * (n - 1) / 2))
    assert uniformity(x) == pytest.approx(expected, rel=1e-12)


def test_alignment_and_uniformity_at_their_ends() -> None:
    """One point: 0 and 0. Opposite points: 4, and distance 2 for the one pair, -2 * 4."""
    same, pair = torch.ones(4, 1), torch.tensor([[1.0], [-1.0]])
    assert (alignment(same, same), uniformity(same)) == (0.0, 0.0)
    assert (alignment(pair, -pair), uniformity(pair)) == (4.0, -8.0)


def test_similarities_are_those_of_all_values_at_once() -> None:
    values = np.tanh(np.random.default_rng(0).normal(0.2, 0.4, size=5003))
    found = Similarities(CPU)
    for part in np.array_split(values, 7):
        found.add(torch.from_numpy(part))
    summary = found.summary()
    assert summary["count"] == 5003 and summary["mean"] == pytest.approx(values.mean(), rel=1e-12)
    for percent in (5, 50, 95):
        assert summary[f"p{percent}"] == pytest.approx(
            np.percentile(values, percent, method="inverted_cdf"), abs=BIN / 2 + 1e-6
        )
    assert summary["histogram"] == np.histogram(values, bins=400, range=(-1, 1))[0].tolist()


def test_similarities_take_what_rounding_left_outside() -> None:
    found = Similarities(CPU)
    found.add(torch.tensor([-1.000001, 1.0, 1.000001]))
    summary = found.summary()
    assert summary["histogram"] == [1, *[0] * 398, 2]
    assert summary["p5"] == pytest.approx(-1, abs=BIN) and summary["p95"] == pytest.approx(1, abs=BIN)


@pytest.mark.parametrize(("n", "expected"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_powers(n: int, expected: list[int]) -> None:
    assert powers(n) == expected


def test_same_class_among_the_hardest_by_sorting() -> None:
    similarity = torch.randn(7, 30, generator=torch.Generator().manual_seed(0))
    same = torch.rand(7, 30, generator=torch.Generator().manual_seed(1)) < 0.3
    counts, hardest = same_class_among(similarity, same, [1, 2, 4, 11])
    for number, size in zip(counts.tolist(), (1, 2, 4, 11), strict=True):
        orders = [sorted(range(30), key=lambda j, row=row: -row[j])[:size] for row in similarity.tolist()]
        assert number == sum(bool(same[i, j]) for i, order in enumerate(orders) for j in order)
    assert torch.equal(hardest, similarity.sort(dim=1, descending=True).values[:, :11])


def test_principal_components_are_the_covariance_s() -> None:
    """The same plane and lengths as the eigenvectors of the covariance, whatever signs those have."""
    features = torch.randn(40, 9, generator=torch.Generator().manual_seed(0)) * torch.linspace(3, 1, 9) + 5
    coordinates, shares = principal_components(features)
    centred = features.double().numpy() - features.double().numpy().mean(axis=0)
    values, vectors = np.linalg.eigh(centred.T @ centred)
    for i in range(2):
        vector = vectors[:, -1 - i]
        vector = vector * np.sign(vector[np.abs(vector).argmax()])
        assert np.allclose(coordinates[:, i].numpy(), centred @ vector, atol=1e-10)
        assert float(shares[i]) == pytest.approx(values[-1 - i] / values.sum())
