"""What limits a step: from a few numbers to a verdict and its evidence."""

from dataclasses import dataclass
from typing import NamedTuple

DATA_WAIT, GPU_BUSY, COMMUNICATION, OP, PEAK = 0.05, 0.9, 0.15, 0.2, 0.4
"""Where a share begins to limit: waiting for data above, GPU at work below, communication above, the op above, achieved
of the peak below.
"""


@dataclass(frozen=True)
class Numbers:
    """Shares of a step's time, unless said otherwise.

    Attributes:
        data_wait: waiting for the loader; None without one.
        gpu_busy: of the step as configured and without its loader, in which the GPU runs anything; None on a CPU.
        communication: between processes. op: the contrastive loss.
        peak: FLOP/s of the encoders' stages over those of a large matrix product in the same precision.
        precision: `trainer.precision`.
    """

    data_wait: float | None
    gpu_busy: float | None
    communication: float
    op: float
    peak: float
    precision: str


class Verdict(NamedTuple):
    """What limits the step, and the numbers that say so."""

    limit: str
    evidence: str


def judge(numbers: Numbers) -> Verdict:
    """The first limit that applies: what starves the device comes before what keeps it busy."""
    if numbers.data_wait is not None and numbers.data_wait > DATA_WAIT:
        return Verdict("input-bound", _over("waiting for data", numbers.data_wait, DATA_WAIT))
    if numbers.gpu_busy is not None and numbers.gpu_busy < GPU_BUSY:
        evidence = f"the GPU is at work in {numbers.gpu_busy:.1%} of the step (limit {GPU_BUSY:.0%})"
        return Verdict("launch-bound", evidence)
    if numbers.communication > COMMUNICATION:
        evidence = _over("communication between processes", numbers.communication, COMMUNICATION)
        return Verdict("communication-bound", evidence)
    if numbers.op > OP:
        return Verdict("op-bound", _over("the contrastive op", numbers.op, OP))
    evidence = (
        f"the encoders reach {numbers.peak:.1%} of the FLOP/s of a large matrix product in {numbers.precision} "
        f"(limit {PEAK:.0%}), and nothing else takes much of the step"
    )
    return Verdict("memory-bound" if numbers.peak < PEAK else "compute-bound", evidence)


def _over(what: str, share: float, limit: float) -> str:
    return f"{what} takes {share:.1%} of the step (limit {limit:.0%})"
