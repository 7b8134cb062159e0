"""Runs the CUDA kernel in the emulator: builds infonce_main, passes it tensors, reads back what it wrote."""

import json
import math
import os
import struct
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from synco_fast.ops import KINDS, HardNegatives, eager, stat_names
from synco_fast.ops.phases import PHASES
from tests.ops.cases import rounding_floor, run
from tests.simt.build import REPOSITORY, build, edited

KERNELS = REPOSITORY / "kernels/cuda"
MAIN = REPOSITORY / "tests/simt/infonce_main.cpp"
ELEMENTS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
ROW_STATS = 16
SHARED_BYTES = 227 << 10


@dataclass(frozen=True)
class Launch:
    """What one launch returned and did."""

    loss: Tensor
    gradient: Tensor
    rank: Tensor
    rank_all: Tensor
    stats: dict[str, Tensor]
    counters: dict[str, int]
    phases: Tensor | None = None  # (blocks, phases) if clocked: how often each ended, by the emulator's clock


def program(variant: str = "plain") -> Path:
    """The kernel as it is."""
    return build([KERNELS / "infonce.cu", MAIN], variant)


def edited_program(
    name: str, edits: Mapping[str, Sequence[tuple[str, str]]], variant: str = "plain", *, flags: tuple[str, ...] = ()
) -> Path:
    """The kernel with pieces of its text replaced, see `edited`."""
    folder = edited(name, (*KERNELS.iterdir(), MAIN), edits)
    return build([folder / "infonce.cu", folder / MAIN.name], variant, flags=flags)


def call(
    program: Path,
    q: Tensor,
    k: Tensor,
    queue: Tensor,
    *,
    hard: HardNegatives,
    temperature: float,
    seed: int = 0,
    step: int = 0,
    row_offset: int = 0,
    processors: int = 4,
    shared_bytes: int = SHARED_BYTES,
    clocked: bool = False,
    schedule: str = "fwd",
    seconds: int = 100,
) -> tuple[subprocess.CompletedProcess[str], bytes]:
    """The finished program, and what it wrote."""
    assert queue.dtype == torch.float16
    header = struct.pack(
        "<19q7d",
        *(len(q), len(queue), q.shape[1], ELEMENTS[q.dtype], ELEMENTS[k.dtype], seed, step, row_offset, processors),
        *(shared_bytes, hard.n_hard if hard.total else 0, *map(hard.count, KINDS)),
        *(hard.extrapolate_from == "negative", clocked),
        *(hard.alpha_max, hard.beta_max, hard.gamma_max, hard.sigma, hard.delta, hard.eta, temperature),
    )
    environment = {**os.environ, "SIMT_SCHED": schedule, "SIMT_TIMEOUT": str(seconds), "ASAN_OPTIONS": "detect_leaks=0"}
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "input", Path(folder) / "output"
        operands = (bytes(x.contiguous().view(torch.uint8).numpy()) for x in (q, k, queue))
        source.write_bytes(b"".join((header, *operands)))
        done = subprocess.run(
            [str(program), str(source), str(target)],
            capture_output=True,
            text=True,
            env=environment,
            timeout=2 * seconds,
            check=False,
        )
        return done, target.read_bytes() if target.exists() else b""


def launch(program: Path, q: Tensor, k: Tensor, queue: Tensor, *, hard: HardNegatives, **arguments: object) -> Launch:
    """One launch, which must succeed and say nothing."""
    done, output = call(program, q, k, queue, hard=hard, **arguments)  # type: ignore[arg-type]
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    batch, dim = q.shape
    floats = 1 + batch * dim + ROW_STATS
    values = torch.frombuffer(bytearray(output[: 4 * floats]), dtype=torch.float32)
    loss, gradient, stats = values.split([1, batch * dim, ROW_STATS])
    integers = torch.frombuffer(bytearray(output[4 * floats :]), dtype=torch.int64)
    ranks, phases = integers[: 2 * batch].view(2, batch), integers[2 * batch :].view(-1, len(PHASES))
    named = dict(zip(stat_names(hard), stats, strict=False))
    return Launch(loss[0], gradient.view(batch, dim), *ranks, named, json.loads(done.stdout), phases)


def assert_right(
    out: Any,
    q: Tensor,
    k: Tensor,
    queue: Tensor,
    *,
    hard: HardNegatives,
    temperature: float,
    exact: bool = False,
    **place: int,
) -> None:
    """Ranks identical to float64; loss and gradient off by at most twice what the same precision is off.

    Where not `exact`, a synthetic negative may tie with the positive to the last bit, and fall on either side.

    Args:
        out: loss, gradient, rank, rank_all and stats of the kernel, on the CPU, as the operands are.
        place: seed, step and row_offset.
    """
    arguments = {"hard": hard, "temperature": temperature, **place}
    truth, true_gradient = run("eager", q.half().double(), k.double(), queue.double(), **arguments)
    peer_loss, peer_gradient = same_precision(q, k, queue, **arguments)
    assert torch.equal(out.rank, truth.rank)
    assert (out.rank_all - truth.rank_all).abs().max() <= (0 if exact else 1)
    loss_floor, gradient_floor = rounding_floor(temperature, len(q), truth.loss.item())
    loss_error, peer_loss_error = (abs(x.item() - truth.loss.item()) for x in (out.loss, peer_loss))
    assert loss_error <= 2 * peer_loss_error + loss_floor
    error, peer_error = ((x.double() - true_gradient).norm().item() for x in (out.gradient, peer_gradient))
    assert error <= 2 * peer_error + gradient_floor
    # The hard set's mean similarity is taken from float16.
    for name, value in truth.stats.items():
        bound = 2.0**-11 if name == "hard_similarity" else 4 * rounding_floor(temperature, len(q))[0]
        assert abs(float(out.stats[name] - value)) <= bound, name


def same_precision(
    q: Tensor,
    k: Tensor,
    queue: Tensor,
    *,
    hard: HardNegatives,
    temperature: float,
    seed: int,
    step: int,
    row_offset: int,
) -> tuple[Tensor, Tensor]:
    """Loss and gradient of `eager` in float32 with one rounding more, which a float16 matrix product needs.

    The queue's weights enter the product with the queue as float16, each row scaled by a power of two so that its
    largest lies in (2^14, 2^15]. The sum of weights takes them unrounded.
    """
    place = {"seed": seed, "step": torch.tensor(step), "row_offset": row_offset}
    out, gradient, *_ = eager.infonce(q, k, queue, hard, temperature, same_class=None, **place)
    query, negatives, key = q.half().double(), queue.double(), k.double()
    similarity = query @ negatives.T
    forms, _ = eager._closed_forms(query, negatives, similarity, hard, seed, place["step"], row_offset)
    logits = torch.cat([(query * key).sum(1, keepdim=True), similarity, *(form.similarity for form in forms)], dim=1)
    log2_weight = similarity / (temperature * math.log(2))
    weight = (log2_weight - log2_weight.amax(1, keepdim=True).ceil() + 15).exp2()
    error = (weight.half() - weight) / weight * torch.softmax(logits / temperature, dim=1)[:, 1 : len(queue) + 1]
    # Weights that vanish in double are nothing in the sum either.
    rounding = error.nan_to_num() @ negatives / (len(q) * temperature)
    return out, gradient + rounding
