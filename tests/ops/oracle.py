"""The op written a second time, for tests: plain Python from the paper's formulas and the design's counter layout.

Nothing here calls the package; `hard` is only read for its numbers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

KIND_NUMBERS = {
    "interpolated": 0,
    "extrapolated": 1,
    "mixed": 2,
    "noisy": 3,
    "perturbed": 4,
    "adversarial": 5,
}
MIN_NORM = 1e-2
_MASK = 2**32 - 1

Vector = Sequence[float]


def philox(seed: int, counter: Sequence[int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 in Python's unbounded integers."""
    c0, c1, c2, c3 = counter
    key0, key1 = seed & _MASK, seed >> 32
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            (product1 >> 32) ^ c1 ^ key0,
            product1 & _MASK,
            (product0 >> 32) ^ c3 ^ key1,
            product0 & _MASK,
        )
        key0, key1 = (key0 + 0x9E3779B9) & _MASK, (key1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def draw(
    kind: str, hard: object, *, seed: int, step: int, row: int, sample: int, n_hard: int, dim: int
) -> tuple[list[int], float, list[float]]:
    """One sample: positions of its parents in the hard set, coefficient, noise (dim numbers for `noisy`, else 0)."""
    number = KIND_NUMBERS[kind]
    words = philox(seed, (row, sample, number, step))
    parents = [word * n_hard // 2**32 for word in (words[:2] if kind == "mixed" else words[:1])]
    low, high = coefficient_range(kind, hard)
    coefficient = low + (high - low) * (words[2] // 2**8) / 2**24

    noise: list[float] = []
    for block in range(1, (dim + 3) // 4 + 1 if kind == "noisy" else 0):
        w = philox(seed, (row, sample, number + 256 * block, step))
        for radius_word, angle_word in ((w[0], w[1]), (w[2], w[3])):
            radius = math.sqrt(-2 * math.log((radius_word // 2**8 + 1) / 2**24))
            angle = 2 * math.pi * (angle_word // 2**8) / 2**24
            noise += [radius * math.cos(angle), radius * math.sin(angle)]
    return parents, coefficient, noise[:dim]


def coefficient_range(kind: str, hard: object) -> tuple[float, float]:
    """The interval of the table in the paper; a point for a constant."""
    bounds = {
        "interpolated": (0.0, "alpha_max"),
        "extrapolated": (1.0, "beta_max"),
        "mixed": (0.0, "gamma_max"),
        "noisy": ("sigma", "sigma"),
        "perturbed": ("delta", "delta"),
        "adversarial": ("eta", "eta"),
    }[kind]
    low, high = (getattr(hard, bound) if isinstance(bound, str) else bound for bound in bounds)
    return low, high


def build(kind: str, q: Vector, parents: Sequence[Vector], c: float, noise: Vector, form: str) -> list[float]:
    """The table of the paper, element by element, then divided by its length. `form` is extrapolate_from."""
    n = parents[0]
    if kind == "interpolated":
        v = [c * a + (1 - c) * b for a, b in zip(q, n, strict=True)]
    elif kind == "extrapolated":
        v = [(a if form == "query" else b) + c * (b - a) for a, b in zip(q, n, strict=True)]
    elif kind == "mixed":
        v = [c * b + (1 - c) * b2 for b, b2 in zip(n, parents[1], strict=True)]
    elif kind == "noisy":
        v = [b + c * e for b, e in zip(n, noise, strict=True)]
    elif kind == "perturbed":
        v = [b + c * a for a, b in zip(q, n, strict=True)]
    else:
        v = [b + c * ((a > 0) - (a < 0)) for a, b in zip(q, n, strict=True)]
    length = max(math.sqrt(dot(v, v)), MIN_NORM)
    return [x / length for x in v]


def dot(a: Vector, b: Vector) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def hard_set(similarity: Vector, n: int) -> list[int]:
    """The n largest, ties to the lower index, -inf never; ascending."""
    order = sorted(range(len(similarity)), key=lambda j: (-similarity[j], j))
    return sorted(j for j in order[:n] if similarity[j] > -math.inf)


@dataclass
class Expected:
    """What `infonce` should return for a batch; the fields are lists over its rows, except loss and stats."""

    loss: float
    gradient: list[list[float]]
    rank: list[int]
    rank_all: list[int]
    stats: dict[str, float]


def infonce(
    q: list[list[float]],
    k: list[list[float]],
    queue: list[list[float]],
    hard: object,
    temperature: float,
    *,
    seed: int,
    step: int,
    row_offset: int = 0,
    labels: list[int] | None = None,
    queue_labels: list[int] | None = None,
) -> Expected:
    """The whole op in loops, for tiny shapes."""
    rows = []
    for i, (query, key) in enumerate(zip(q, k, strict=True)):
        allowed = [labels is None or labels[i] != queue_labels[j] for j in range(len(queue))]
        similarity = [dot(query, n) if ok else -math.inf for n, ok in zip(queue, allowed, strict=True)]
        groups = {
            "positive": [key],
            "queue": [n for n, ok in zip(queue, allowed, strict=True) if ok],
            **_synthesize(query, queue, hard_set(similarity, hard.n_hard), hard, seed, step, row_offset + i),
        }
        rows.append(_row(query, groups, temperature, [s for s in similarity if s > -math.inf], hard))
    batch = len(rows)
    return Expected(
        loss=math.fsum(row["loss"] for row in rows) / batch,
        gradient=[[x / batch for x in row["gradient"]] for row in rows],
        rank=[row["rank"] for row in rows],
        rank_all=[row["rank_all"] for row in rows],
        stats={name: math.fsum(row["stats"][name] for row in rows) / batch for name in rows[0]["stats"]},
    )


def _synthesize(
    query: Vector, queue: list[list[float]], chosen: list[int], hard: object, seed: int, step: int, row: int
) -> dict[str, list[list[float]]]:
    vectors: dict[str, list[list[float]]] = {kind: [] for kind in KIND_NUMBERS if getattr(hard, kind)}
    for kind, made in vectors.items():
        for sample in range(getattr(hard, kind) if chosen else 0):
            positions, c, noise = draw(
                kind, hard, seed=seed, step=step, row=row, sample=sample, n_hard=len(chosen), dim=len(query)
            )
            parents = [queue[chosen[position]] for position in positions]
            made.append(build(kind, query, parents, c, noise, hard.extrapolate_from))
    return vectors


def _row(query: Vector, groups: dict[str, list[list[float]]], t: float, similarity: list[float], hard: object) -> dict:
    """InfoNCE of one query: -log(exp(q.k / t) / sum_v exp(q.v / t)); its gradient is (sum_v p_v v - k) / t."""
    key = groups["positive"][0]
    weights = {name: [math.exp((dot(query, v) - dot(query, key)) / t) for v in group] for name, group in groups.items()}
    total = math.fsum(w for group in weights.values() for w in group)
    pairs = [(w / total, v) for name, g in groups.items() for w, v in zip(weights[name], g, strict=True)]
    above = {name: sum(dot(query, v) >= dot(query, key) for v in group) for name, group in groups.items()}
    stats = {f"mass_{name}": math.fsum(group) / total for name, group in weights.items()}
    kinds = [name for name in groups if name not in ("positive", "queue")]
    if kinds:
        hardest = sorted(similarity, reverse=True)[: hard.n_hard]
        stats["synthetic_share"] = sum(stats[f"mass_{kind}"] for kind in kinds)
        stats["hard_similarity"] = math.fsum(hardest) / max(len(hardest), 1)
    return {
        "loss": math.log(total),
        "gradient": [(math.fsum(p * v[d] for p, v in pairs) - key[d]) / t for d in range(len(query))],
        "rank": above["queue"],
        "rank_all": sum(above.values()) - above["positive"],
        "stats": {
            "acc1": float(above["queue"] < 1),
            "acc5": float(above["queue"] < 5),
            "positive_similarity": dot(query, key),
            **stats,
        },
    }


def frozen_loss(q: Tensor, k: Tensor, queue: Tensor, vectors: Tensor, temperature: float) -> Tensor:
    """InfoNCE over [positive, queue, vectors (B, S, D)] with the vectors given."""
    positive = (q * k).sum(dim=1, keepdim=True)
    logits = torch.cat([positive, q @ queue.T, (q[:, None] * vectors).sum(dim=2)], dim=1) / temperature
    return (logits.logsumexp(dim=1) - logits[:, 0]).mean()
