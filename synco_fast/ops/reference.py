"""The `reference` backend: every vector and every logit materialised, gradient by autograd. The oracle.

It is the definition written out, in any float dtype and on any device. What it shares with `eager` is what decides
which function is computed, and not how: the draws, each kind's coefficients (`terms`), the rounding of q (`round_to`)
and the order of the statistics (`pack_stats`). Use it in float64 to check the others; not to train.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from synco_fast.ops.draws import draw
from synco_fast.ops.hard import HardNegatives, terms
from synco_fast.ops.numbers import MIN_NORM, compute_dtype, round_to
from synco_fast.ops.result import SyntheticSet, pack_stats


def hardest_by_sort(similarity: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The hard set by a stable sort: the same contract as `select.hardest`, by another road."""
    # Adding 0 turns -0.0 into 0.0, which a radix sort would set apart.
    order = torch.sort(similarity + 0.0, dim=1, descending=True, stable=True)
    allowed = order.values[:, :n] > -torch.inf
    last = similarity.shape[1]
    indices = torch.where(allowed, order.indices[:, :n], last).sort(dim=1).values
    return torch.where(indices < last, indices, 0), allowed.sum(dim=1, keepdim=True)


def synthesize(
    q: Tensor,
    negatives: Tensor,
    hard: HardNegatives,
    seed: int,
    step: Tensor,
    row_offset: int,
    same_class: Tensor | None = None,
) -> dict[str, SyntheticSet]:
    """All kinds in use, as vectors. They are constants: nothing here carries a gradient except `logits`, through q.

    q (B, D) and the queue's rows, negatives (K, D), are in the compute dtype, rounded already. same_class is (B, K)
    bool, True for negatives that the class oracle leaves out.
    """
    if not hard.total:
        return {}
    anchor = q.detach()
    similarity = anchor @ negatives.T
    if same_class is not None:
        similarity = similarity.masked_fill(same_class, -torch.inf)
    hard_set, size = hardest_by_sort(similarity, hard.n_hard)
    rows = row_offset + torch.arange(len(q), device=q.device)

    sets = {}
    for kind in hard.kinds:
        draws = draw(kind, hard, seed=seed, step=step, rows=rows, n_hard=size, like=anchor)
        coefficients = draws.coefficients
        parents = hard_set.gather(1, draws.parents.flatten(1)).view_as(draws.parents)
        on_query, on_parents = terms(kind, coefficients[..., None], hard)
        vectors = on_query * anchor[:, None]
        for term, parent in zip(on_parents, parents.unbind(-1), strict=True):
            vectors = vectors + term * negatives[parent]
        if draws.noise is not None:
            vectors = vectors + coefficients[..., None] * draws.noise
        if kind == "adversarial":
            vectors = vectors + coefficients[..., None] * anchor.sign()[:, None]
        vectors = F.normalize(vectors, dim=-1, eps=MIN_NORM)
        # A row whose class oracle left no negative at all has no parents: its synthetic negatives weigh nothing.
        logits = torch.einsum("bd,bsd->bs", q, vectors).masked_fill(size == 0, -torch.inf)
        sets[kind] = SyntheticSet(vectors, logits, parents, coefficients)
    return sets


def infonce(
    q: Tensor,
    k: Tensor,
    queue: Tensor,
    hard: HardNegatives,
    temperature: float,
    seed: int,
    step: Tensor,
    row_offset: int,
    same_class: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss (differentiable), rank, rank_all and statistics. Arguments as in the op."""
    q, negatives = round_to(q, queue), queue.detach().to(compute_dtype(queue))
    sets = synthesize(q, negatives, hard, seed, step, row_offset, same_class)
    positive = (q * k.to(q.dtype)).sum(dim=1, keepdim=True)
    real = q @ negatives.T
    if same_class is not None:
        real = real.masked_fill(same_class, -torch.inf)
    groups = [positive, real, *(s.logits for s in sets.values())]
    similarities = torch.cat(groups, dim=1)
    logits = similarities / temperature
    loss = F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64, device=q.device))

    with torch.no_grad():
        # Before the division, which can round neighbouring similarities to one logit.
        above = similarities[:, 1:] >= positive
        rank = above[:, : real.shape[1]].sum(dim=1)
        masses = [m.sum(dim=1) for m in logits.softmax(dim=1).split([g.shape[1] for g in groups], dim=1)]
        stats = pack_stats(rank, positive[:, 0], masses, _hard_similarity(real, hard))
    return loss, rank, above.sum(dim=1), stats


def _hard_similarity(real: Tensor, hard: HardNegatives) -> Tensor | None:
    if not hard.total:
        return None
    top = real.topk(hard.n_hard, dim=1).values
    return torch.where(top > -torch.inf, top, 0).sum(dim=1) / (top > -torch.inf).sum(dim=1).clamp(min=1)
