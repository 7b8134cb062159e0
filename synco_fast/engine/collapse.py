"""Whether the keys still tell images apart: a network that maps all of them to one place learns nothing."""

import torch
from torch import Tensor

_NEWEST = 4096  # rows that are looked at
SPREAD, RANK = 0.1, 2.0
"""Below either, after the first epoch, the keys have collapsed."""


def spread_and_rank(rows: Tensor, pointer: Tensor, count: int) -> dict[str, float]:
    """How the newest keys lie on the sphere. Waits for the device.

    Args:
        rows: queue (K, D) of unit rows. pointer: int64 scalar, place of the oldest. count: keys that were put in.

    Returns:
        key_spread: root of the keys' total variance: 1 where they point everywhere, 0 where all are one.
        key_rank: effective rank of their covariance (Roy and Vetterli, 2007), exp of its spectrum's entropy: 1 to D.
    """
    places = (pointer - 1 - torch.arange(min(_NEWEST, len(rows), count), device=rows.device)) % len(rows)
    keys = rows[places].double()
    variances = torch.linalg.eigvalsh(keys.T.cov(correction=0)).clamp(min=0)
    shares = variances / variances.sum()
    rank = torch.exp(torch.special.entr(shares).sum())
    return {"key_spread": float(variances.sum().sqrt()), "key_rank": float(rank.nan_to_num(1.0))}


def alarm(row: dict[str, float]) -> str | None:
    """What to say of keys that have collapsed; None: they have not."""
    if row["key_spread"] >= SPREAD and row["key_rank"] >= RANK:
        return None
    return (
        f"warning: the keys have collapsed: their spread is {row['key_spread']:.3f} (0: all are one, 1: everywhere), "
        f"their effective rank {row['key_rank']:.1f}; lower optim.lr, or raise model.momentum or loss.temperature"
    )
