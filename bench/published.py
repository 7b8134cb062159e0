"""What the op is measured against: MoCo's loss, and SynCo's loss in the style it was published in.

Written here from a description of their behaviour; no line is taken from the released code, whose licence is
non-commercial. Like that code, the published style
  - clones the whole queue at every step;
  - takes the hard negatives by `torch.topk` on the similarities, and parents by `torch.randint`;
  - materialises every synthetic negative, (B, S, D) a kind;
  - asks autograd for the gradient of q . n with respect to n, one call for each sample of `perturbed` and of
    `adversarial`: 128 calls at the defaults, for what is q and sign(q);
  - lengthens the logits (B, 1 + K + ...) kind by kind, which copies them each time.

MoCo's queue is (D, K), as in its paper's listing; here it is (K, D), as ours is. Products are in the queue's dtype and
the cross-entropy in float32, as under autocast; for a float32 queue that is float32 throughout.

Beside each loss stand its floating-point operations and the bytes it moves, forward and backward. The operations are
those of products of q and negatives, two for a multiply-add. The bytes are counted as if each operation of PyTorch read
its inputs from memory once and wrote its result there once; views, and tensors of (B, D) or less, count as nothing.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import Case
from synco_fast.ops import HardNegatives


class Picks(NamedTuple):
    """What is drawn for one kind.

    Attributes:
        parents: (B, S, 1), or (B, S, 2) for `mixed`: int64 rows of the queue.
        coefficients: (B, S, 1): a, b or g; unused by the other kinds.
        noise: (B, S, D) standard normals for `noisy`, else None.
    """

    parents: Tensor
    coefficients: Tensor
    noise: Tensor | None


Pick = Callable[[str, HardNegatives, Tensor, Tensor], Picks]
"""pick(kind, hard, hard rows (B, N) of the queue, q (B, D)): where the draws come from. Tests pass their own."""


def random_picks(kind: str, hard: HardNegatives, hard_rows: Tensor, q: Tensor) -> Picks:
    """Draw from torch's generator."""
    batch, count = len(q), hard.count(kind)
    drawn = [
        hard_rows.gather(1, torch.randint(hard.n_hard, (batch, count), device=q.device))
        for _ in range(2 if kind == "mixed" else 1)
    ]
    low, high = {
        "interpolated": (0.0, hard.alpha_max),
        "extrapolated": (1.0, hard.beta_max),
        "mixed": (0.0, hard.gamma_max),
    }.get(kind, (0.0, 0.0))
    coefficients = low + (high - low) * torch.rand(batch, count, 1, device=q.device, dtype=q.dtype)
    noise = torch.randn(batch, count, q.shape[1], device=q.device, dtype=q.dtype) if kind == "noisy" else None
    return Picks(torch.stack(drawn, dim=-1), coefficients, noise)


def moco(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """MoCo's loss (arXiv 1911.05722, Algorithm 1). q, k (B, D); queue (D, K)."""
    q, k = q.to(queue.dtype), k.to(queue.dtype)
    positive = torch.einsum("bd,bd->b", q, k)[:, None]
    negative = torch.einsum("bd,dk->bk", q, queue.clone().detach())
    logits = torch.cat([positive, negative], dim=1)
    logits /= temperature
    return _first_of(logits)


def moco_flops(case: Case) -> int:
    """4 B K D: q Q^T, and the gradient with respect to q."""
    return 4 * case.batch * case.queue * case.dim


def moco_bytes(case: Case) -> int:
    """The queue 4 times: the clone reads and writes it, the product and the gradient's product read it.

    Logits in its dtype 8 times: the product writes, `cat` and the division read and write; backward, the division reads
    and writes, the product reads. See `_cross_entropy_bytes` for what follows.
    """
    logits = case.batch * case.queue
    return case.element * (4 * case.queue * case.dim + 8 * logits) + _cross_entropy_bytes(case, logits)


def _cross_entropy_bytes(case: Case, logits: int) -> int:
    """6 passes in float32: log_softmax reads and writes; backward, a gradient of its shape is written, it and the
    result are read, and the logits' gradient is written. From a 16-bit dtype, there and back are 4 passes more."""
    return logits * (4 * 6 + (0 if case.element == 4 else 2 * (4 + case.element)))


def published(
    q: Tensor, k: Tensor, queue: Tensor, hard: HardNegatives, temperature: float, pick: Pick = random_picks
) -> Tensor:
    """SynCo's loss in the published style. q, k (B, D); queue (K, D)."""
    positive, negative, hard_rows, q, rows = _real(q, k, queue, hard)
    logits = torch.cat([positive, negative], dim=1)
    for kind in hard.kinds:
        vectors = _vectors(kind, hard, q.detach(), rows, pick(kind, hard, hard_rows, q), _by_autograd)
        logits = torch.cat([logits, torch.einsum("bd,bsd->bs", q, vectors)], dim=1)
    logits /= temperature
    return _first_of(logits)


def synthetic_flops(case: Case) -> int:
    """4 B K D as in MoCo, and 4 B S D for all S synthetic negatives: their logits, and the gradient's share."""
    return moco_flops(case) + 4 * case.batch * case.hard.total * case.dim


def published_bytes(case: Case) -> int:
    """As MoCo's, with top-k's pass over the similarities, one `cat` a kind (each reads and writes all logits so far),
    and the passes of `_VECTOR_PASSES` over each kind's (B, S, D)."""
    length, passes = case.queue, 0
    for kind in case.hard.kinds:
        length += case.hard.count(kind)
        passes += 2 * length
    return _materialised_bytes(case, passes, _VECTOR_PASSES)


def vectorised_bytes(case: Case) -> int:
    """As `published_bytes`, with the one `cat` that MoCo has too, and fewer passes for the two closed forms."""
    return _materialised_bytes(case, 0, {**_VECTOR_PASSES, "perturbed": 11, "adversarial": 13})


# Reads and writes of a tensor (B, S, D). Each kind: gathering 2, the length 1, the division by it 2, logits 1, their
# gradient 1. Then the combination: 6 for two scaled terms and their sum (a scaled query is written only), 3 more for
# the second gathering and reading of `mixed`. `perturbed` and `adversarial`: a sample's clone 2, product 1, gradient 1
# and stack 2; the sign 2; the scaling 2 and the sum 3.
_VECTOR_PASSES = {
    "interpolated": 13,
    "extrapolated": 13,
    "mixed": 16,
    "noisy": 13,
    "perturbed": 18,
    "adversarial": 20,
}


def _materialised_bytes(case: Case, more_logits: int, vector_passes: dict[str, int]) -> int:
    """MoCo's bytes with S logits more, top-k's pass, `more_logits` elements a row, and the vectors' passes."""
    batch, hard = case.batch, case.hard
    logits = batch * (case.queue + hard.total)
    top_k = batch * case.queue if hard.n_hard else 0
    vectors = sum(vector_passes[kind] * batch * hard.count(kind) * case.dim for kind in hard.kinds)
    elements = 4 * case.queue * case.dim + 8 * logits + top_k + batch * more_logits + vectors
    return case.element * elements + _cross_entropy_bytes(case, logits)


def compiled_bytes(case: Case) -> int:
    """A lower count for `published_vectorised` compiled: every chain of pointwise operations is one pass.

    The queue twice (no clone); similarities 7 times: written, read by top-k, by the maximum, by the sum and backward,
    the gradient written and read; each kind's vectors: parents read, the result written, read by logits and gradient.
    """
    batch, hard = case.batch, case.hard
    vectors = sum((5 if kind == "mixed" else 4) * hard.count(kind) for kind in hard.kinds)
    elements = 2 * case.queue * case.dim + 7 * batch * (case.queue + hard.total) + vectors * batch * case.dim
    return case.element * elements


def published_vectorised(
    q: Tensor, k: Tensor, queue: Tensor, hard: HardNegatives, temperature: float, pick: Pick = random_picks
) -> Tensor:
    """`published` with the gradient of q . n written down, not asked for, and one concatenation."""
    *pieces, hard_rows, q, rows = _real(q, k, queue, hard)
    for kind in hard.kinds:
        vectors = _vectors(kind, hard, q.detach(), rows, pick(kind, hard, hard_rows, q), _by_hand)
        pieces.append(torch.einsum("bd,bsd->bs", q, vectors))
    logits = torch.cat(pieces, dim=1)
    logits /= temperature
    return _first_of(logits)


def _real(q: Tensor, k: Tensor, queue: Tensor, hard: HardNegatives) -> tuple[Tensor, ...]:
    """Similarities (B, 1) and (B, K), hard rows (B, N), q in the queue's dtype, and the queue cloned."""
    q, k, rows = q.to(queue.dtype), k.to(queue.dtype), queue.clone().detach()
    positive = torch.einsum("bd,bd->b", q, k)[:, None]
    negative = torch.einsum("bd,kd->bk", q, rows)
    hard_rows = torch.topk(negative.detach(), hard.n_hard, dim=1).indices
    return positive, negative, hard_rows, q, rows


def _vectors(
    kind: str,
    hard: HardNegatives,
    anchor: Tensor,
    rows: Tensor,
    picks: Picks,
    gradient: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """The synthetic negatives (B, S, D) of one kind."""
    query, negatives, c = anchor[:, None], rows[picks.parents[..., 0]], picks.coefficients
    if kind == "interpolated":
        vectors = c * query + (1 - c) * negatives
    elif kind == "extrapolated":
        start = query if hard.extrapolate_from == "query" else negatives
        vectors = start + c * (negatives - query)
    elif kind == "mixed":
        vectors = c * negatives + (1 - c) * rows[picks.parents[..., 1]]
    elif kind == "noisy":
        assert picks.noise is not None
        vectors = negatives + hard.sigma * picks.noise
    elif kind == "perturbed":
        vectors = negatives + hard.delta * gradient(anchor, negatives)
    else:
        vectors = negatives + hard.eta * gradient(anchor, negatives).sign()
    return F.normalize(vectors, dim=-1)


def _by_autograd(anchor: Tensor, negatives: Tensor) -> Tensor:
    """Gradient of q . n with respect to each n (B, S, D), one call of autograd for each of the S samples."""
    gradients: list[Tensor] = []
    for sample in range(negatives.shape[1]):
        negative = negatives[:, sample].clone().requires_grad_()
        similarity = torch.einsum("bd,bd->b", anchor, negative)
        gradients += torch.autograd.grad(similarity.sum(), negative)
    return torch.stack(gradients, dim=1)


def _by_hand(anchor: Tensor, negatives: Tensor) -> Tensor:
    """The same: it is q."""
    return anchor[:, None].expand_as(negatives)


def _first_of(logits: Tensor) -> Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64, device=logits.device))
