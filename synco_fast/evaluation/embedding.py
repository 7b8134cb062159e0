"""What an embedding is like, as numbers: pure functions of unit rows, of their similarities and of labels."""

import math

import torch
from torch import Tensor

BIN = 1e-4
"""Width of the bins that quantiles of similarities are read from: what they are exact to."""
SHOWN = 400
"""Bins of a histogram as it is written down: of 0.005 each, from -1 to 1."""

_BINS = round(2 / BIN)
_BLOCK = 512  # rows whose distances to all others are held at a time, in float64


def alignment(x: Tensor, y: Tensor) -> float:
    """Mean ||x - y||^2 over positive pairs (Wang and Isola, arXiv 2005.10242, with alpha 2), in float64.

    Args:
        x, y: (n, D) unit rows; row i of both is of one image.
    """
    return float((x.double() - y.double()).square().sum(dim=1).mean())


def uniformity(x: Tensor) -> float:
    """Log of the mean of exp(-2 ||u - v||^2) over the unordered pairs of distinct rows (arXiv 2005.10242, t 2).

    In float64, block by block: memory grows with n, time with its square.

    Args:
        x: (n, D) unit rows, n >= 2.
    """
    rows, n = x.double(), len(x)
    length2 = rows.square().sum(dim=1)
    total = 0.0
    for start in range(0, n, _BLOCK):
        part = rows[start : start + _BLOCK]
        others = rows[start:]
        distance2 = length2[start : start + _BLOCK, None] + length2[None, start:] - 2 * part @ others.T
        total += float((-2 * distance2.clamp(min=0)).exp().triu(diagonal=1).sum())
    return math.log(total / (n * (n - 1) / 2))


def powers(n: int) -> list[int]:
    """1, 2, 4, ... up to n, and n."""
    return [*(2**i for i in range(n.bit_length()) if 2**i < n), n]


def same_class_among(similarity: Tensor, same_class: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor]:
    """Of each query's most similar rows, how many are of its class.

    Args:
        similarity: (B, K). same_class: (B, K) bool. sizes: ascending, at most K.

    Returns:
        (len(sizes),) int64, same-class rows among the hardest N, summed over the queries; and the similarities
        (B, sizes[-1]) of the hardest.
    """
    hardest = similarity.topk(sizes[-1], dim=1, sorted=True)
    counts = same_class.gather(1, hardest.indices).cumsum(dim=1)
    columns = torch.tensor(sizes, device=similarity.device) - 1
    return counts[:, columns].sum(dim=0), hardest.values


def principal_components(features: Tensor, count: int = 2) -> tuple[Tensor, Tensor]:
    """Coordinates of rows along their first principal components, in float64.

    A component's sign is such that its largest loading is positive, so that the same rows give the same picture.

    Args:
        features: (n, F), n > count.

    Returns:
        (n, count) coordinates, and (count,) shares of the variance.
    """
    centred = features.double() - features.double().mean(dim=0)
    left, strength, loadings = torch.linalg.svd(centred, full_matrices=False)
    largest = loadings.gather(1, loadings.abs().argmax(dim=1, keepdim=True))[:, 0]
    shares = strength.square() / strength.square().sum().clamp(min=torch.finfo(torch.float64).tiny)
    return (left * strength * largest.sign())[:, :count], shares[:count]


class Similarities:
    """The distribution of cosine similarities that come part by part; its memory does not grow with them."""

    def __init__(self, device: torch.device) -> None:
        self._counts = torch.zeros(_BINS, dtype=torch.int64, device=device)
        self._sum = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, values: Tensor) -> None:
        """More of them, of any shape; rounding may have left them a little outside of [-1, 1]."""
        places = ((values.flatten().double() + 1) / BIN).long().clamp(0, _BINS - 1)
        self._counts += torch.bincount(places, minlength=_BINS)
        self._sum += values.sum(dtype=torch.float64)

    def summary(self) -> dict[str, float | int | list[int]]:
        """count, mean; p5, p50 and p95 to BIN; histogram: counts in SHOWN equal bins from -1 to 1."""
        counts = self._counts.cpu()
        count = int(counts.sum())
        quantiles = {f"p{percent}": self._quantile(counts, percent / 100) for percent in (5, 50, 95)}
        shown = counts.view(SHOWN, -1).sum(dim=1).tolist()
        return {"count": count, "mean": float(self._sum) / count, **quantiles, "histogram": shown}

    @staticmethod
    def _quantile(counts: Tensor, share: float) -> float:
        """The middle of the bin in which the smallest value lies that so large a share does not exceed."""
        reached = counts.cumsum(dim=0)
        place = int(torch.searchsorted(reached, torch.tensor(max(1, math.ceil(share * int(reached[-1]))))))
        return round((place + 0.5) * BIN - 1, 6)
