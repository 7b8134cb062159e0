"""The op inside a step: where its time goes by its own clocks, and what each kind costs by leaving it out."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from synco_fast.methods.contrast import Contrast, MomentumContrast
from synco_fast.ops import HardNegatives, infonce
from synco_fast.ops.dispatch import choose
from synco_fast.ops.phases import record
from synco_fast.profiling.estimates import difference, quantiles
from synco_fast.profiling.rounds import device_clock, interleaved
from synco_fast.profiling.subject import Subject, Views

_ALL, _NONE = "all", "none"
_CLOCKED_BACKENDS = ("cpu", "cuda")


@dataclass(frozen=True)
class Operands:
    """What the op is called with in a step: the first micro-batch's q and k (B, D), and the queue (K, D).

    Attributes:
        backend: the one in use. fastest: the one that "auto" comes to.
    """

    q: Tensor
    k: Tensor
    queue: Tensor
    temperature: float
    seed: int
    backend: str
    fastest: str

    def call(self, hard: HardNegatives) -> None:
        with torch.no_grad():
            infonce(
                self.q,
                self.k,
                self.queue,
                hard=hard,
                temperature=self.temperature,
                seed=self.seed,
                backend=self.backend,
            )


def operands(subject: Subject, views: Views) -> Operands:
    """Those of a step, which it takes."""
    found: list[tuple[Tensor, Tensor]] = []

    def keep(contrast: MomentumContrast, inputs: tuple[Any, ...], output: Contrast) -> None:
        if not found:  # here images and autocast are as the encoder has them
            q = F.normalize(contrast.query_encoder(inputs[0]).float(), dim=1)
            found.append((q.detach(), output.keys.detach()))

    contrast = subject.contrast
    handle = contrast.register_forward_hook(keep)
    try:
        subject.take(views)
    finally:
        handle.remove()
    (q, k), queue = found[0], contrast.queue.rows.clone()
    backend, fastest = (
        choose(name, queue, subject.hard, contrast.temperature, None) for name in (contrast.backend, "auto")
    )
    return Operands(q, k, queue, contrast.temperature, contrast.seed, backend, fastest)


def phases(op: Operands, hard: HardNegatives, calls: int) -> tuple[dict[str, float] | None, str]:
    """Each phase's share of the op by the clocks inside it, in their order; or None, and why there is none."""
    if op.backend not in _CLOCKED_BACKENDS:
        return None, f"backend {op.backend} has no clocks inside; {' and '.join(_CLOCKED_BACKENDS)} have"
    try:
        with record(op.queue.device) as clock:
            for _ in range(calls):
                op.call(hard)
        return clock.shares(), ""
    except RuntimeError as error:
        return None, str(error)


def leave_out(hard: HardNegatives) -> dict[str, HardNegatives]:
    """All negatives, none of the synthetic ones, and all but one kind, by the kind that is left out."""
    changes: dict[str, Any] = {kind: {kind: 0} for kind in hard.kinds}
    without = {kind: replace(hard, **change) for kind, change in changes.items()}
    choices = {_ALL: hard, _NONE: HardNegatives.none()}
    return choices | {kind: rest if rest.total else HardNegatives.none() for kind, rest in without.items()}


def measure(op: Operands, hard: HardNegatives, rounds: int) -> dict[str, Any]:
    """The op's time, its phases' shares, and what each kind costs by either account."""
    choices = {name: _call(op, left) for name, left in leave_out(hard).items()}
    times = interleaved(choices, device_clock, op.queue.device, rounds)
    shares, reason = phases(op, hard, rounds)
    whole = quantiles(times[_ALL])
    kinds = []
    for kind in hard.kinds:
        left_out = difference(times[_ALL], times[kind])
        own, clock = (None, None) if shares is None else _clocked(shares, hard, kind, whole["median_ms"])
        agrees = None if clock is None else left_out["low_ms"] <= clock <= left_out["high_ms"]
        kinds.append(
            {
                "kind": kind,
                "count": hard.count(kind),
                "left_out": left_out,
                "own_phase_ms": own,
                "clock_ms": clock,
                "agrees": agrees,
            }
        )
    return {
        "backend": op.backend,
        "fastest_backend": op.fastest,
        "shape": {"B": len(op.q), "K": len(op.queue), "D": op.queue.shape[1]},
        "dtype": str(op.queue.dtype).removeprefix("torch."),
        "time": whole,
        "without_synthetic": quantiles(times[_NONE]),
        "synthetic": difference(times[_ALL], times[_NONE]) if hard.kinds else None,
        "kinds": kinds,
        "phases": shares,
        "no_phases_because": reason or None,
        "rounds_ns": times,
    }


def _clocked(shares: dict[str, float], hard: HardNegatives, kind: str, whole: float) -> tuple[float, float]:
    """Milliseconds of a kind's own phase, and with what of the draws and parents leaving it out would save."""
    draws = shares["draws"] * hard.count(kind) / hard.total
    parents = shares["parents"] * (1 - _parents(hard, without=kind) / _parents(hard))
    return whole * shares[kind], whole * (shares[kind] + draws + parents)


def _parents(hard: HardNegatives, without: str = "") -> float:
    """Rows of the hard set that are somebody's parent, in the mean: each draw misses a row with 1 - 1 / N."""
    draws = sum(hard.count(kind) * (2 if kind == "mixed" else 1) for kind in hard.kinds if kind != without)
    return hard.n_hard * (1 - (1 - 1 / hard.n_hard) ** draws)


def _call(op: Operands, hard: HardNegatives) -> Any:
    return lambda: op.call(hard)
