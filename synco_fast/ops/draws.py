"""What each synthetic negative is made of, drawn by Philox from (seed; row, sample, kind, step).

Counter words: (global row, sample index within its kind, kind | block << 8, step). Block 0 gives the two parents
(words 0 and 1) and the coefficient (word 2); blocks 1, 2, ... give the noise, four elements each.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from synco_fast.ops.hard import KINDS, HardNegatives
from synco_fast.ops.philox import integers, normals, philox, uniform


@dataclass(frozen=True)
class Draws:
    """One kind's draws for a batch.

    Attributes:
        parents: (B, S, 1), or (B, S, 2) for `mixed`: int64 positions in the row's hard set.
        coefficients: (B, S): a, b or g; for the other kinds the constant sigma, delta or eta.
        noise: (B, S, D) standard normals for `noisy`, else None.
    """

    parents: Tensor
    coefficients: Tensor
    noise: Tensor | None


def draw(
    kind: str, hard: HardNegatives, *, seed: int, step: Tensor, rows: Tensor, n_hard: Tensor | int, like: Tensor
) -> Draws:
    """Draw one kind.

    Args:
        kind: one of KINDS.
        hard: counts and strengths.
        seed: 64-bit key.
        step: int64 scalar tensor, the training step.
        rows: (B,) int64, each query's row in the global batch.
        n_hard: size of the hard set, one number or (B, 1) int64.
        like: (B, D) tensor whose last dimension and dtype the noise takes.
    """
    samples = torch.arange(hard.count(kind), device=rows.device)
    number = KINDS.index(kind)
    first, second, third, _ = philox(seed, rows[:, None], samples, number, step)
    parents = [integers(first, n_hard)] + ([integers(second, n_hard)] if kind == "mixed" else [])

    low, high = coefficient_range(kind, hard)
    coefficients = low + (high - low) * uniform(third, like.dtype)

    noise = None
    if kind == "noisy":
        dim = like.shape[-1]
        blocks = torch.arange(1, (dim + 3) // 4 + 1, device=rows.device)
        words = philox(seed, rows[:, None, None], samples[:, None], number | blocks << 8, step)
        noise = normals(words, like.dtype).flatten(-2)[..., :dim]
    return Draws(torch.stack(parents, dim=-1), coefficients, noise)


def coefficient_range(kind: str, hard: HardNegatives) -> tuple[float, float]:
    """The interval the coefficient is uniform on; a single point for the kinds with a constant one."""
    return {
        "interpolated": (0.0, hard.alpha_max),
        "extrapolated": (1.0, hard.beta_max),
        "mixed": (0.0, hard.gamma_max),
        "noisy": (hard.sigma, hard.sigma),
        "perturbed": (hard.delta, hard.delta),
        "adversarial": (hard.eta, hard.eta),
    }[kind]
