"""Inputs and settings for the op's tests, and how exact an answer in float32 can be."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from synco_fast.ops import KINDS, HardNegatives, InfoNCE, infonce

BACKENDS = ("reference", "eager")


def alone(kind: str, n_hard: int = 12, count: int = 6, **changes: Any) -> HardNegatives:
    """Only one kind."""
    return replace(HardNegatives.none(), n_hard=n_hard, **{kind: count}, **changes)


def everything(n_hard: int = 12, **changes: Any) -> HardNegatives:
    """All kinds, each with another count."""
    return replace(HardNegatives(n_hard, 6, 5, 7, 4, 3, 2), **changes)


SETTINGS = {
    "none": HardNegatives.none(),
    **{kind: alone(kind) for kind in KINDS},
    "extrapolated from the negative": alone("extrapolated", extrapolate_from="negative"),
    "all": everything(),
    "all, strong": everything(
        alpha_max=1.0, beta_max=4.0, gamma_max=0.5, sigma=0.3, delta=0.7, eta=0.4, extrapolate_from="negative"
    ),
    "mochi": HardNegatives.mochi(12, 16, 4),
}


def with_n_hard(hard: HardNegatives, n_hard: int) -> HardNegatives:
    """The same setting with another hard set; `none` stays as it is."""
    return replace(hard, n_hard=n_hard) if hard.total else hard


def run(backend: str, q: Tensor, k: Tensor, queue: Tensor, **arguments: Any) -> tuple[InfoNCE, Tensor]:
    """The op's result and the gradient of its loss with respect to q."""
    leaf = q.detach().clone().requires_grad_()
    out = infonce(leaf, k, queue, backend=backend, **arguments)
    (gradient,) = torch.autograd.grad(out.loss, leaf)
    return out, gradient


def unit_rows(rows: int, dim: int, seed: int) -> Tensor:
    """(rows, dim) float64 random unit rows."""
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(rows, dim, generator=generator, dtype=torch.float64), dim=1)


def batch(
    rows: int = 5, dim: int = 16, queue_rows: int = 40, seed: int = 0, noise: float = 0.5
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k near q, and a queue: float64 unit rows."""
    q = unit_rows(rows, dim, seed)
    k = torch.nn.functional.normalize(q + noise * unit_rows(rows, dim, seed + 1000), dim=1)
    return q, k, unit_rows(queue_rows, dim, seed + 2000)


def exact_rows(rows: int, dim: int, seed: int) -> Tensor:
    """(rows, dim) float64 unit rows whose dot products come out the same in any dtype and in any order.

    dim 64: +-1/8; 128: +-1/8 in a random half of the places, else 0; 256: +-1/16. Dot products are multiples of
    1/64 or coarser in [-1, 1], so a queue of more than a hundred rows is full of ties.
    """
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (rows, dim), generator=generator) * 2.0 - 1
    if dim == 128:
        order = torch.rand(rows, dim, generator=generator).argsort(dim=1)
        signs = signs * (order < 64)
    return signs.double() / (16 if dim == 256 else 8)


def rounding_floor(temperature: float, rows: int, loss: float = 0.0) -> tuple[float, float]:
    """How far a correct float32 answer may be from the truth: the loss, and the gradient's Frobenius norm.

    The same-precision reference's own error may be small by luck, so a bound of twice that needs a floor. With
    eps = 2^-23, a dot product of unit rows and a length are each off by about eps, and a synthetic similarity takes a
    dot product, a length, their quotient and the division by t: a logit is off by 4 eps / t, and so is the log of a
    sum of weights. A row of the gradient is (sum_v p_v v - k) / (B t). The p_v sum to 1, so an error that all logits
    share drops out, and what differs between them averages over the negatives: eps / t is left of it, a row is off by
    eps / (B t^2), and the B rows together by eps / (sqrt(B) t^2).

    A loss that is not small against 1 / t is rounded itself: the logarithm, its sum with the positive's logit and the
    mean over the batch are each off by up to eps / 2 of it, and together by about eps.
    """
    eps = 2.0**-23
    return 4 * eps / temperature + eps * loss, eps / (rows**0.5 * temperature**2)


def grid_rows(rows: int, dim: int, seed: int, bits: int = 11) -> Tensor:
    """(rows, dim) float64 random rows of nearly unit length, entries multiples of 2^-bits.

    Dot products are multiples of 4^-bits of at most about 1, so for bits <= 11 every partial sum is exact in float32,
    in any order: hard sets and ranks of random rows must then be the same on every backend. bits = 11 is exact in
    float16, bits = 8 in bfloat16 too.
    """
    return (unit_rows(rows, dim, seed) * 2**bits).round() / 2**bits


def near(q: Tensor, seed: int, bits: int = 11) -> Tensor:
    """Keys for the queries q (B, D), on the grid."""
    k = torch.nn.functional.normalize(q + 0.7 * unit_rows(*q.shape, seed), dim=1)
    return (k * 2**bits).round() / 2**bits


def tied_rows(batch: int, queue_rows: int, seed: int = 60) -> tuple[Tensor, Tensor]:
    """q (batch, 64) and a queue on the grid, float64: similarities that tie in float16, and in part in float32 too.

    All rows of the queue are the first query, with one entry a step of the grid off or none.
    """
    q = grid_rows(batch, 64, seed)
    generator = torch.Generator().manual_seed(seed)
    place = torch.randint(64, (queue_rows, 1), generator=generator)
    steps = torch.randint(-1, 2, (queue_rows, 1), generator=generator) / 2**11
    return q, q[:1].repeat(queue_rows, 1).scatter_add_(1, place, steps.double())
