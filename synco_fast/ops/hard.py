"""Which synthetic negatives, how many of each, and how strong: the one description every backend takes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

KINDS = ("interpolated", "extrapolated", "mixed", "noisy", "perturbed", "adversarial")
"""The kinds of synthetic negative. The position of a kind in this tuple is its number in the Philox counter."""

MOST = 2**20
"""Of a count: far beyond what anybody asks for, and within what a machine can hold."""


@dataclass(frozen=True)
class HardNegatives:
    """Synthetic hard negatives of one query (SynCo, arXiv 2410.02401, section 3; MoCHi, arXiv 2010.01028).

    With q the query and n, n_i, n_j rows drawn uniformly with replacement from the hard set, the vectors are,
    before normalisation:

    ============ ================================ =======================
    interpolated a q + (1 - a) n                  a ~ U(0, alpha_max)
    extrapolated q + b (n - q)                    b ~ U(1, beta_max)
    mixed        g n_i + (1 - g) n_j              g ~ U(0, gamma_max)
    noisy        n + sigma e, e ~ N(0, I)
    perturbed    n + delta q
    adversarial  n + eta sign(q)
    ============ ================================ =======================

    Attributes:
        n_hard: size of the hard set: the rows of the queue most similar to the query. 0 when nothing is made.
        interpolated, extrapolated, mixed, noisy, perturbed, adversarial: vectors of that kind for each query, at most
            2^20.
        extrapolate_from: "query" is the form above, which the published numbers came from; "negative" is the
            one the paper's text states, n + b (n - q).
    """

    n_hard: int = 1024
    interpolated: int = 256
    extrapolated: int = 256
    mixed: int = 256
    noisy: int = 64
    perturbed: int = 64
    adversarial: int = 64
    alpha_max: float = 0.5
    beta_max: float = 1.5
    gamma_max: float = 1.0
    sigma: float = 0.01
    delta: float = 0.01
    eta: float = 0.01
    extrapolate_from: Literal["query", "negative"] = "query"

    def __post_init__(self) -> None:
        for name in ("n_hard", *KINDS):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MOST:
                raise ValueError(f"{name} must be a whole number in [0, {MOST}], got {value!r}")
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not low <= value <= high or value == math.inf:
                raise ValueError(f"{name} must lie in [{low}, {high}] and be finite, got {value!r}")
            object.__setattr__(self, name, float(value))
        if self.extrapolate_from not in ("query", "negative"):
            raise ValueError(f'extrapolate_from must be "query" or "negative", got {self.extrapolate_from!r}')
        if self.total and not self.n_hard:
            raise ValueError(f"n_hard is 0, but {self.total} synthetic negatives need parents: n_hard must be >= 1")

    @classmethod
    def synco(cls, **changes: Any) -> "HardNegatives":
        """SynCo's published setting: 1024 hard negatives, 256 + 256 + 256 + 64 + 64 + 64 synthetic ones."""
        return cls(**changes)

    @classmethod
    def mochi(cls, n_hard: int = 1024, mixed: int = 1024, interpolated: int = 128) -> "HardNegatives":
        """MoCHi (N, s, s'): s mixtures of two hard negatives, s' mixtures of the query and one."""
        return cls(n_hard, interpolated, 0, mixed, 0, 0, 0)

    @classmethod
    def none(cls) -> "HardNegatives":
        """Plain MoCo."""
        return cls(0, 0, 0, 0, 0, 0, 0)

    def count(self, kind: str) -> int:
        """Vectors of a kind for each query."""
        return getattr(self, kind)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds with at least one vector, in the order of KINDS."""
        return tuple(kind for kind in KINDS if self.count(kind))

    @property
    def total(self) -> int:
        """Synthetic negatives for each query."""
        return sum(self.count(kind) for kind in KINDS)


_RANGES = (
    ("alpha_max", 0.0, 1.0),
    ("beta_max", 1.0, math.inf),
    ("gamma_max", 0.0, 1.0),
    ("sigma", 0.0, math.inf),
    ("delta", 0.0, math.inf),
    ("eta", 0.0, math.inf),
)

FIELDS = tuple(field.name for field in fields(HardNegatives))


def pack(hard: HardNegatives) -> tuple[list[int], list[float], str]:
    """The types an operator schema knows: counts, strengths, extrapolate_from."""
    values = [getattr(hard, name) for name in FIELDS]
    return values[:7], [float(value) for value in values[7:13]], values[13]


def unpack(counts: Sequence[int], strengths: Sequence[float], extrapolate_from: str) -> HardNegatives:
    """What `pack` packed. torch.compile may have made the counts symbols: int() makes them numbers."""
    values = (*map(int, counts), *strengths, extrapolate_from)
    return HardNegatives(**dict(zip(FIELDS, values, strict=True)))  # type: ignore[arg-type]


class Terms(NamedTuple):
    """Coefficients of a synthetic vector q_term * q + parent_terms[0] * n_i (+ parent_terms[1] * n_j)."""

    query: Any
    parents: tuple[Any, ...]


def terms(kind: str, coefficient: Any, hard: HardNegatives) -> Terms:
    """The linear part of a kind's vector; `noisy` and `adversarial` add sigma e and eta sign(q) to it."""
    c = coefficient
    if kind == "interpolated":
        return Terms(c, (1 - c,))
    if kind == "extrapolated":
        return Terms(1 - c, (c,)) if hard.extrapolate_from == "query" else Terms(-c, (1 + c,))
    if kind == "mixed":
        return Terms(0 * c, (c, 1 - c))
    if kind == "perturbed":
        return Terms(c, (0 * c + 1,))
    return Terms(0 * c, (0 * c + 1,))
