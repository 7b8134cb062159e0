"""What a fused backend selected and drew inside a call, bit for bit against the reference and eager."""

import torch
from torch import Tensor

from synco_fast.ops import HardNegatives, eager, synthesize
from synco_fast.ops.draws import draw
from synco_fast.ops.select import hardest
from tests.ops import oracle
from tests.ops.cases import alone, everything

PLACES = (
    {"seed": 4, "step": 5, "row_offset": 6},
    {"seed": 2**63 - 1, "step": 2**32 + 3, "row_offset": 2**32 - 2},
    {"seed": 2**40 + 5, "step": -1, "row_offset": 2**31 - 1},
)
"""Seeds, steps and rows of more than 32 bits among them; the second one's rows wrap within a batch."""

DRAWN = {
    "all": everything(),
    # Intervals whose length is no power of two: a product with it is rounded, and shows where it is fused into a sum.
    "odd lengths": everything(
        alpha_max=0.3, beta_max=1.37, gamma_max=0.9, sigma=0.3, delta=0.7, eta=0.4, extrapolated=300
    ),
    "mixed alone": alone("mixed", count=1100),
}


def assert_same_draws(
    hard_set: Tensor,
    first: Tensor,
    second: Tensor,
    coefficients: Tensor,
    q: Tensor,
    queue: Tensor,
    *,
    hard: HardNegatives,
    seed: int,
    step: int,
    row_offset: int,
) -> None:
    """The hard set, the parents of every synthetic negative and its coefficient are what all other backends take.

    Args:
        hard_set: (B, n_hard) rows of the queue.
        first, second: (B, hard.total) positions of the parents in it, kind after kind. Of second, `mixed` counts alone.
        coefficients: (B, hard.total) float32.
        q: (B, D). queue: (K, D). All dot products exact in float32 (`exact_rows`, `grid_rows`).
    """
    query, negatives = q.to(queue.dtype).float(), queue.float()
    exact = query.double() @ negatives.double().T
    assert torch.equal(hard_set, hardest(exact, hard.n_hard)[0])
    assert hard_set.tolist() == [oracle.hard_set(row, hard.n_hard) for row in exact.tolist()]

    place = {"seed": seed, "step": torch.tensor(step)}
    rows = row_offset + torch.arange(len(q))
    sets = synthesize(q, queue, hard=hard, **place, row_offset=row_offset)
    forms, _ = eager._closed_forms(query, negatives, query @ negatives.T, hard, **place, row_offset=row_offset)
    counts = [hard.count(kind) for kind in hard.kinds]
    parts = zip(*(x.split(counts, dim=1) for x in (first, second, coefficients)), strict=True)
    for kind, form, (one, other, coefficient) in zip(hard.kinds, forms, parts, strict=True):
        drawn = draw(kind, hard, **place, rows=rows, n_hard=hard.n_hard, like=query)
        positions = torch.stack([one, other] if kind == "mixed" else [one], dim=-1)
        assert torch.equal(positions, drawn.parents), kind
        parents = hard_set.gather(1, positions.flatten(1)).view_as(positions)
        assert torch.equal(parents, sets[kind].parents) and torch.equal(parents, form.parents), kind
        assert torch.equal(coefficient, drawn.coefficients), kind
        assert torch.equal(coefficient, sets[kind].coefficients), kind
