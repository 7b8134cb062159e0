"""What limits a step: from a few numbers to a verdict, its evidence and the keys to turn."""

from dataclasses import dataclass
from typing import NamedTuple

DATA_WAIT, GPU_BUSY, HOST_BUSY, COMMUNICATION, OP, PEAK = 0.05, 0.9, 0.5, 0.15, 0.2, 0.4
"""Where a share begins to limit: waiting for data above, GPU at work below and host at work above, communication above,
the op above, achieved of the peak below.
"""


@dataclass(frozen=True)
class Numbers:
    """Shares of a step's time, unless said otherwise.

    Attributes:
        data_wait: waiting for the loader; None without one.
        gpu_busy, host_busy: in which the GPU runs anything and the host does not wait for data; None on a CPU.
        communication: between processes. op: the contrastive loss.
        peak: FLOP/s of the encoders' stages over those of a large matrix product in the same precision.
        precision: `trainer.precision`.
    """

    data_wait: float | None
    gpu_busy: float | None
    host_busy: float | None
    communication: float
    op: float
    peak: float
    precision: str


class Verdict(NamedTuple):
    """What limits the step, the numbers that say so, and for each key that helps, how to set it."""

    limit: str
    evidence: str
    advice: dict[str, str]


def judge(numbers: Numbers) -> Verdict:
    """The first limit that applies: what starves the device comes before what keeps it busy."""
    if numbers.data_wait is not None and numbers.data_wait > DATA_WAIT:
        return Verdict("input-bound", _over("waiting for data", numbers.data_wait, DATA_WAIT), _INPUT)
    gpu_busy, host_busy = numbers.gpu_busy, numbers.host_busy
    if gpu_busy is not None and host_busy is not None and gpu_busy < GPU_BUSY and host_busy > HOST_BUSY:
        evidence = (
            f"the GPU is at work in {gpu_busy:.1%} of the step (limit {GPU_BUSY:.0%}), while the host is busy "
            f"launching in {host_busy:.1%} of it"
        )
        return Verdict("launch-bound", evidence, _LAUNCH)
    if numbers.communication > COMMUNICATION:
        evidence = _over("communication between processes", numbers.communication, COMMUNICATION)
        return Verdict("communication-bound", evidence, _COMMUNICATION)
    if numbers.op > OP:
        return Verdict("op-bound", _over("the contrastive op", numbers.op, OP), _OP)
    evidence = (
        f"the encoders reach {numbers.peak:.1%} of the FLOP/s of a large matrix product in {numbers.precision} "
        f"(limit {PEAK:.0%}), and nothing else takes much of the step"
    )
    if numbers.peak < PEAK:
        return Verdict("memory-bound", evidence, _MEMORY)
    return Verdict("compute-bound", evidence, _COMPUTE)


def _over(what: str, share: float, limit: float) -> str:
    return f"{what} takes {share:.1%} of the step (limit {limit:.0%})"


_INPUT = {
    "data.threads": "more, up to the CPU cores that each process has",
    "data.prefetch": "more, where the wait comes in bursts",
    "data.root": "shards, which `synco-fast data pack` makes, where files are small and storage is slow",
    "data.augmentation": "compiled; plain is many times slower",
}
_LAUNCH = {
    "speed.cuda_graph": "true, on one process: the whole step is launched at once",
    "speed.compile": "true: fewer and longer kernels",
}
_COMMUNICATION = {
    "trainer.accumulate": "more, with a larger data.batch_size: gradients are averaged once a step",
    "bn.mode": "split: keys are shuffled within each process, and nothing is gathered for it",
}
_OP = {
    "loss.backend": "auto, or the fastest that `synco-fast doctor` says can be used",
    "queue.dtype": "a 16-bit one; bf16 where the CPU has instructions for it",
    "negatives.n_hard": "less, which makes selection and parents cheaper, or fewer vectors of the costliest kind",
    "queue.size": "less: the op's products are linear in it",
}
_MEMORY = {
    "trainer.precision": "bf16, where the device has instructions for it: half the bytes",
    "speed.channels_last": "true, the default",
    "speed.compile": "true: fused kernels pass over activations fewer times",
}
_COMPUTE = {
    "data.image_size": "less: convolutions are linear in the pixels",
    "model.arch": "a smaller one",
    "trainer.device": "more of them, under torchrun",
}
