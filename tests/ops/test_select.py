"""The hard set: exact, ties to the lower index, canonical order; two implementations against plain Python."""

import math
from collections.abc import Callable

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor

from synco_fast.ops.reference import hardest_by_sort
from synco_fast.ops.select import hardest
from tests.ops import oracle
from tests.ops.cases import exact_rows

Hardest = Callable[[Tensor, int], tuple[Tensor, Tensor]]
both = pytest.mark.parametrize("implementation", [hardest, hardest_by_sort])


def check(implementation: Hardest, similarity: Tensor, n: int) -> None:
    """Indices and size as stated; what is past the size is 0."""
    indices, size = implementation(similarity, n)
    expected = [oracle.hard_set(row, n) for row in similarity.tolist()]
    assert indices.dtype == size.dtype == torch.int64
    assert indices.shape == (len(similarity), n) and size.shape == (len(similarity), 1)
    assert size[:, 0].tolist() == [len(row) for row in expected]
    assert indices.tolist() == [row + [0] * (n - len(row)) for row in expected]


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("n", [1, 2, 100, 499, 500])
def test_exact_vectors_full_of_ties(implementation: Hardest, dtype: torch.dtype, dim: int, n: int) -> None:
    q = exact_rows(6, dim, seed=1).to(dtype).float()
    queue = exact_rows(500, dim, seed=2).to(dtype).float()
    similarity = q @ queue.T
    assert len(similarity.unique()) < 64, "not full of ties"
    assert torch.equal(similarity.double(), q.double() @ queue.double().T), "not exact"
    check(implementation, similarity, n)


@both
@pytest.mark.parametrize("n", [1, 17, 63, 64])
def test_collapsed_queue(implementation: Hardest, n: int) -> None:
    """All rows equal: the first n."""
    similarity = torch.full((3, 64), 0.71875)
    check(implementation, similarity, n)
    assert implementation(similarity, n)[0].tolist() == [list(range(n))] * 3


@both
@pytest.mark.parametrize("n", range(1, 9))
def test_negative_zero_ties_with_zero(implementation: Hardest, n: int) -> None:
    similarity = torch.tensor(
        [[-0.0, 0.0, -0.0, 0.0, 1.0, -1.0, 0.0, -0.0], [0.0, -0.0, -1.0, -0.0, -1.0, 0.0, -0.0, 0.0]]
    )
    check(implementation, similarity, n)


@both
@pytest.mark.parametrize("n", range(1, 7))
def test_excluded_negatives_are_never_taken(implementation: Hardest, n: int) -> None:
    """Rows with 0 to 6 allowed entries, so most hold fewer than n; ties among the allowed and among the excluded."""
    out = -math.inf
    similarity = torch.tensor(
        [
            [out, out, out, out, out, out],
            [out, out, -1.0, out, out, out],
            [0.5, out, out, out, 0.5, out],
            [out, 0.5, 0.25, out, out, 0.5],
            [0.5, 0.5, 0.5, out, out, 0.5],
            [0.5, -1.0, out, 0.5, -1.0, 0.0],
            [-1.0, -1.0, -1.0, -1.0, -1.0, -1.0],
        ]
    )
    check(implementation, similarity, n)


@both
def test_values_one_step_apart_are_not_ties(implementation: Hardest) -> None:
    below = torch.nextafter(torch.tensor(0.5), torch.tensor(0.0)).item()
    similarity = torch.tensor([[below, 0.5, below, 0.5], [0.5, below, below, below]])
    assert implementation(similarity, 2)[0].tolist() == [[1, 3], [0, 1]]


@both
def test_input_is_left_alone(implementation: Hardest) -> None:
    similarity = torch.tensor([[-0.0, 0.0, 0.5, -math.inf]])
    before = similarity.clone()
    implementation(similarity, 2)
    assert torch.equal(similarity, before) and torch.equal(similarity.signbit(), before.signbit())


@both
def test_columns_of_a_transposed_matrix(implementation: Hardest) -> None:
    check(implementation, torch.randn(30, 4, generator=torch.Generator().manual_seed(0)).T, 7)


@both
@hypothesis.settings(max_examples=150, deadline=None, derandomize=True, database=None)
@hypothesis.given(data=st.data())
def test_any_matrix(implementation: Hardest, data: st.DataObject) -> None:
    columns = data.draw(st.integers(1, 12))
    entry = st.sampled_from([-math.inf, -1.0, -0.5, -0.0, 0.0, 0.5, 1.0]) | st.floats(-1, 1, width=32)
    rows = data.draw(st.lists(st.lists(entry, min_size=columns, max_size=columns), min_size=1, max_size=3))
    check(implementation, torch.tensor(rows), data.draw(st.integers(1, columns)))
