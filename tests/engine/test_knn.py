"""kNN accuracy against its definition written out in float64, one query at a time."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from synco_fast.engine.knn import NearestNeighbours, knn_accuracy


def winners(bank: Tensor, bank_labels: Tensor, features: Tensor, k: int, temperature: float) -> list[int]:
    """The class that wins each query's vote (Wu et al., arXiv 1805.01978, section 3.4), the lowest of equals."""
    rows = bank.double().numpy()
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    found = []
    for query in features.double().numpy():
        similarity = rows @ (query / np.linalg.norm(query))
        votes: dict[int, float] = {}
        for i in np.argsort(-similarity, kind="stable")[:k]:
            label = int(bank_labels[i])
            votes[label] = votes.get(label, 0.0) + float(np.exp((similarity[i] - 1) / temperature))
        found.append(min(votes, key=lambda label: (-votes[label], label)))
    return found


def gaussian(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("bank", "queries", "width", "classes", "k", "temperature"),
    [
        (200, 50, 16, 5, 10, 0.07),
        (97, 31, 3, 7, 20, 0.2),
        (1, 3, 1, 1, 1, 1.0),
        (33, 513, 5, 4, 1, 0.07),
        (64, 1025, 8, 10, 5, 0.5),
        (40, 9, 6, 3, 40, 0.01),
    ],
)
def test_equals_the_definition(bank: int, queries: int, width: int, classes: int, k: int, temperature: float) -> None:
    """Rows of any length; one wrong winner among the queries would bring the accuracy below 1."""
    rows = gaussian(bank, width, seed=0) * gaussian(bank, 1, seed=1).exp()
    labels = torch.arange(bank) % classes
    features = 100 * gaussian(queries, width, seed=2)
    expected = torch.tensor(winners(rows, labels, features, k, temperature))
    assert knn_accuracy(rows, labels, features, expected, k=k, temperature=temperature) == 1.0
    # A known share of wrong labels is counted as such.
    wrong = expected.clone()
    wrong[: queries // 3] += 1
    accuracy = knn_accuracy(rows, labels, features, wrong, k=k, temperature=temperature)
    assert accuracy == (queries - queries // 3) / queries


def test_k_beyond_the_bank_is_the_whole_bank() -> None:
    rows, labels, features = gaussian(12, 4, seed=3), torch.arange(12) % 3, gaussian(40, 4, seed=4)
    expected = torch.tensor(winners(rows, labels, features, 12, 0.1))
    assert len(set(expected.tolist())) > 1
    assert knn_accuracy(rows, labels, features, expected, k=200, temperature=0.1) == 1.0


def test_near_neighbours_outvote_many_far_ones() -> None:
    """exp(1 / t) against two times exp(0.6 / t): the near one wins at t = 0.07, the two at t = 1."""
    rows = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8]])
    labels, query = torch.tensor([1, 0, 0]), torch.tensor([[2.0, 0.0]])
    for temperature, winner in ((0.07, 1), (1.0, 0)):
        assert knn_accuracy(rows, labels, query, torch.tensor([winner]), k=3, temperature=temperature) == 1.0
        assert knn_accuracy(rows, labels, query, torch.tensor([1 - winner]), k=3, temperature=temperature) == 0.0


def test_equal_votes_go_to_the_lower_class() -> None:
    rows = torch.tensor([[3.0, 4.0], [3.0, 4.0], [6.0, 8.0], [6.0, 8.0]])
    for labels in ([2, 1, 1, 2], [1, 2, 2, 1]):
        accuracy = knn_accuracy(
            rows, torch.tensor(labels), torch.tensor([[3.0, 4.0]]), torch.tensor([1]), k=4, temperature=0.07
        )
        assert accuracy == 1.0


def test_duplicates_at_the_last_place_change_nothing() -> None:
    """Which of several equal rows is the k-th does not matter when they are of one class."""
    rows = torch.cat([torch.eye(4)[:1], torch.eye(4)[1:2].expand(10, 4)])
    labels, query = torch.tensor([0] + [1] * 10), torch.tensor([[0.8, 0.6, 0.0, 0.0]])
    # Votes at t = 0.5: exp(1.6) = 4.95 for class 0, and 3.32 for each duplicate.
    for k, winner in ((2, 0), (3, 1), (11, 1)):
        assert knn_accuracy(rows, labels, query, torch.tensor([winner]), k=k, temperature=0.5) == 1.0


def test_a_class_that_the_bank_lacks_is_never_right() -> None:
    rows, labels, features = gaussian(10, 3, seed=5), torch.zeros(10, dtype=torch.int64), gaussian(8, 3, seed=6)
    truth = torch.tensor([0, 0, 0, 7, 7, 7, 7, 7])
    assert knn_accuracy(rows, labels, features, truth, k=3, temperature=0.07) == 3 / 8


def test_small_temperatures_stay_finite() -> None:
    """exp(1 / 0.001) is beyond float32, and beyond float64 too; the nearest neighbour simply wins."""
    rows, labels, features = gaussian(50, 6, seed=7), torch.arange(50) % 5, gaussian(20, 6, seed=8)
    nearest = torch.tensor(winners(rows, labels, features, 1, 1.0))
    assert knn_accuracy(rows, labels, features, nearest, k=10, temperature=1e-4) == 1.0
    assert knn_accuracy(rows, labels, features, nearest, k=10, temperature=1e-60) == 1.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_features_of_any_dtype(dtype: torch.dtype) -> None:
    rows, labels, features = gaussian(60, 8, seed=9).to(dtype), torch.arange(60) % 4, gaussian(30, 8, seed=10).to(dtype)
    expected = torch.tensor(winners(rows, labels, features, 7, 0.07))
    assert knn_accuracy(rows, labels, features, expected, k=7, temperature=0.07) == 1.0


class Largest(TorchDispatchMode):
    """Watches the number of elements of the largest tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_similarities_are_never_all_in_memory() -> None:
    """10,000 queries against 20,000 rows are 200 million similarities; a part is 1,024 of them against 4,096."""
    neighbours = NearestNeighbours(gaussian(10000, 4, seed=12), 5)
    with Largest() as largest:
        for i in range(40):
            neighbours.add(gaussian(500, 4, seed=i), torch.arange(500) % 10)
        neighbours.best()
    assert 1024 * 4096 < largest.elements <= 1024 * (4096 + 5)


def test_a_bank_in_parts_is_the_bank() -> None:
    """Batches of any size, an empty one and a larger one than a part among them; k is not reached before the third."""
    rows, labels, features = gaussian(9000, 6, seed=13), torch.arange(9000) % 7, gaussian(1500, 6, seed=14)
    whole = NearestNeighbours(features, 20)
    whole.add(rows, labels)
    sizes = [3, 0, 7, 5000, 3990]
    parts = NearestNeighbours(features, 20)
    for some_rows, some_labels in zip(rows.split(sizes), labels.split(sizes), strict=True):
        parts.add(some_rows, some_labels)
        if parts.rows < 20:
            assert parts.best()[0].shape == (1500, parts.rows)
    similarity, classes = parts.best()
    expected = F.normalize(features.double(), dim=1) @ F.normalize(rows.double(), dim=1).T
    best = expected.topk(20, dim=1)
    torch.testing.assert_close(similarity.double(), best.values, rtol=0, atol=8 * torch.finfo(torch.float32).eps)
    assert torch.equal(classes, labels[best.indices])
    assert torch.equal(classes, whole.best()[1]) and parts.rows == 9000
