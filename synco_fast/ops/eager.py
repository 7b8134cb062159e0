"""The `eager` backend: closed forms in plain PyTorch, with the gradient finished in the forward pass.

No synthetic vector of a two-term kind is made. What is materialised: the (B, K) similarities and weights, the parents
of `mixed`, `noisy` and `adversarial` (B, S, D), and the noise. The gradient is linear in the negatives and every
synthetic negative is a combination of q, sign(q), noise and rows of the queue, so its weight is added to the weights
of its parents and one product with the queue serves them all (docs/design.md, The op).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from synco_fast.ops.draws import draw
from synco_fast.ops.hard import HardNegatives, terms
from synco_fast.ops.numbers import MIN_NORM, compute_dtype, round_to
from synco_fast.ops.result import pack_stats
from synco_fast.ops.select import hardest


@dataclass(frozen=True)
class ClosedForm:
    """One kind's synthetic negatives v / |v|, v = on_query q + sum_i on_parents[i] n_i + extra, without v.

    Attributes:
        similarity: (B, S), q . v / |v|.
        scale: (B, S), 1 / |v|.
        parents: (B, S, P) int64 rows of the queue.
        on_query: (B, S). on_parents: P tensors (B, S).
        extra: sigma e (B, S, D), eta sign(q) (B, 1, D), or None.
    """

    similarity: Tensor
    scale: Tensor
    parents: Tensor
    on_query: Tensor
    on_parents: tuple[Tensor, ...]
    extra: Tensor | None


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, its gradient with respect to q (compute dtype), rank, rank_all and statistics. Arguments as in the op."""
    q, negatives = round_to(q, queue), queue.to(compute_dtype(queue))
    k = k.to(q.dtype)
    positive = (q * k).sum(dim=1, keepdim=True)
    similarity = q @ negatives.T
    if same_class is not None:
        similarity = similarity.masked_fill(same_class, -torch.inf)
    forms, hard_similarity = _closed_forms(q, negatives, similarity, hard, seed, step, row_offset)

    peak = torch.cat([positive, similarity.amax(dim=1, keepdim=True)], dim=1)
    peak = torch.cat([peak, *(form.similarity for form in forms)], dim=1).amax(dim=1, keepdim=True)
    weight_positive, weights, *synthetic_weights = (
        ((s - peak) / temperature).exp() for s in (positive, similarity, *(form.similarity for form in forms))
    )
    sums = [w.sum(dim=1) for w in (weight_positive, weights, *synthetic_weights)]
    total = torch.stack(sums).sum(dim=0)
    loss = (total.log() + (peak - positive)[:, 0] / temperature).mean()

    pull = weight_positive * k
    for form, w in zip(forms, synthetic_weights, strict=True):
        pull = pull + _spread(form, w * form.scale, weights, q)
    grad = (((pull + weights @ negatives) / total[:, None] - k) / (len(q) * temperature)).contiguous()  # whatever k is

    rank = (similarity >= positive).sum(dim=1)
    rank_all = rank + sum((form.similarity >= positive).sum(dim=1) for form in forms)
    stats = pack_stats(rank, positive[:, 0], [s / total for s in sums], hard_similarity)
    return loss, grad, rank, rank_all, stats


def _closed_forms(
    q: Tensor, negatives: Tensor, similarity: Tensor, hard: HardNegatives, seed: int, step: Tensor, row_offset: int
) -> tuple[list[ClosedForm], Tensor | None]:
    """The closed form of each kind in use, and the hard set's mean similarity (B,)."""
    if not hard.total:
        return [], None
    hard_set, size = hardest(similarity, hard.n_hard)
    inside = torch.arange(hard.n_hard, device=q.device) < size
    hard_similarity = torch.where(inside, similarity.gather(1, hard_set), 0).sum(dim=1) / size[:, 0].clamp(min=1)
    row_norm2 = negatives.square().sum(dim=1)
    rows = row_offset + torch.arange(len(q), device=q.device)

    forms = []
    for kind in hard.kinds:
        draws = draw(kind, hard, seed=seed, step=step, rows=rows, n_hard=size, like=q)
        parents = hard_set.gather(1, draws.parents.flatten(1)).view_as(draws.parents)
        x = torch.where(size > 0, similarity.gather(1, parents.flatten(1)), 0).view(parents.shape)
        extra = None
        if draws.noise is not None:
            extra = draws.coefficients[..., None] * draws.noise
        elif kind == "adversarial":
            extra = hard.eta * q.sign()[:, None]
        form = _closed_form(kind, draws.coefficients, hard, q, negatives, parents, x, row_norm2[parents], extra)
        form.similarity.masked_fill_(size == 0, -torch.inf)
        forms.append(form)
    return forms, hard_similarity


def _closed_form(
    kind: str,
    coefficients: Tensor,
    hard: HardNegatives,
    q: Tensor,
    negatives: Tensor,
    parents: Tensor,
    x: Tensor,
    norm2: Tensor,
    extra: Tensor | None,
) -> ClosedForm:
    """q . v and |v|^2 from x = q . n and n . n (both (B, S, P)); only cross terms between rows touch the vectors."""
    on_query, on_parents = terms(kind, coefficients, hard)
    q_norm2 = q.square().sum(dim=1, keepdim=True)
    dot = on_query * q_norm2
    length2 = on_query.square() * q_norm2
    for i, term in enumerate(on_parents):
        dot = dot + term * x[..., i]
        length2 = length2 + term.square() * norm2[..., i] + 2 * on_query * term * x[..., i]
    if kind == "mixed":
        first, second = (negatives[parent] for parent in parents.unbind(-1))
        length2 = length2 + 2 * on_parents[0] * on_parents[1] * (first * second).sum(dim=-1)
    if extra is not None:
        dot = dot + (extra * q[:, None]).sum(dim=-1)
        length2 = length2 + (extra * (2 * negatives[parents[..., 0]] + extra)).sum(dim=-1)
    scale = length2.clamp(min=MIN_NORM**2).rsqrt()
    return ClosedForm(dot * scale, scale, parents, on_query, on_parents, extra)


def _spread(form: ClosedForm, weight: Tensor, weights: Tensor, q: Tensor) -> Tensor:
    """Add sum_s weight_s v_s to the gradient: the parents' share into weights (B, K), in place; returns the rest."""
    for term, parent in zip(form.on_parents, form.parents.unbind(-1), strict=True):
        weights.scatter_add_(1, parent, weight * term)
    rest = (weight * form.on_query).sum(dim=1, keepdim=True) * q
    if form.extra is not None:
        rest = rest + torch.einsum("bs,bsd->bd", weight, form.extra.expand(*weight.shape, -1))
    return rest
