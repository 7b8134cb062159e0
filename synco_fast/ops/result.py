"""What the op returns, and the names of its statistics."""

from typing import NamedTuple

import torch
from torch import Tensor

from synco_fast.ops.hard import HardNegatives


class InfoNCE(NamedTuple):
    """Result of `infonce`.

    Attributes:
        loss: scalar, the mean over the batch; differentiable with respect to q.
        rank: (B,) int64: queue negatives that score at or above the positive. 0 is a right answer of the proxy task.
        rank_all: (B,) int64: the same, counting synthetic negatives too.
        stats: named scalars on the device, detached; see `stat_names`.
    """

    loss: Tensor
    rank: Tensor
    rank_all: Tensor
    stats: dict[str, Tensor]


class SyntheticSet(NamedTuple):
    """The synthetic negatives of one kind, materialised.

    Attributes:
        vectors: (B, S, D), unit rows.
        logits: (B, S), q . vector, not yet divided by the temperature.
        parents: (B, S, 1) or (B, S, 2) int64 rows of the queue.
        coefficients: (B, S).
    """

    vectors: Tensor
    logits: Tensor
    parents: Tensor
    coefficients: Tensor


def stat_names(hard: HardNegatives) -> tuple[str, ...]:
    """Names of the statistics, in the order in which a backend returns their values.

    acc1, acc5: share of queries with fewer than 1 (5) queue negatives at or above the positive.
    positive_similarity: mean of q . k. mass_*: mean share of the softmax denominator that the positive, the queue
    and each kind hold. With synthetic negatives also their whole share and the hard set's mean similarity.
    """
    names: tuple[str, ...] = ("acc1", "acc5", "positive_similarity", "mass_positive", "mass_queue")
    names += tuple(f"mass_{kind}" for kind in hard.kinds)
    return (*names, "synthetic_share", "hard_similarity") if hard.total else names


def pack_stats(rank: Tensor, positive: Tensor, masses: list[Tensor], hard_similarity: Tensor | None) -> Tensor:
    """Values of `stat_names` as one float32 vector.

    Args:
        rank: (B,) queue negatives at or above the positive.
        positive: (B,) q . k.
        masses: (B,) tensors: of the positive, the queue, then each kind in use.
        hard_similarity: (B,) mean similarity of the hard set, or None without synthetic negatives.
    """
    columns = [rank < 1, rank < 5, positive, *masses]
    if hard_similarity is not None:
        columns += [torch.stack(masses[2:]).sum(0), hard_similarity]
    return torch.stack([column.float() for column in columns]).mean(dim=1)
