"""Who is compared: for each contender, how its step is built, what it must compute and move, and why it may be absent.

A step is the loss, forward, and its gradient with respect to q, backward.
"""

import importlib.util
import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bench import published
from bench.case import Case, Inputs
from synco_fast.ops import backends, infonce

Step = Callable[[], Tensor]
"""One forward and backward pass; returns the gradient (B, D)."""

SEED = 0
_STEPS = 256

WORKSPACE = 2**26
"""Bytes of similarities a fused kernel keeps at a time, to select from (docs/design.md, The op)."""


class Contender(NamedTuple):
    """How to build a case's step, and its counts."""

    build: Callable[[Case, Inputs], Step]
    flops: Callable[[Case], int]
    bytes: Callable[[Case], int]


def _moco(case: Case, inputs: Inputs) -> Step:
    queue = inputs.queue.T.contiguous()
    return _differentiated(inputs.q, lambda: published.moco(inputs.q, inputs.k, queue, case.temperature))


def _published(case: Case, inputs: Inputs) -> Step:
    return _differentiated(inputs.q, lambda: published.published(*inputs, case.hard, case.temperature))


def _published_vectorised(case: Case, inputs: Inputs) -> Step:
    return _differentiated(inputs.q, lambda: published.published_vectorised(*inputs, case.hard, case.temperature))


def _compiled(case: Case, inputs: Inputs) -> Step:
    # Each case is compiled for its own sizes. All of a run's cases share one code object, hence the limit.
    torch._dynamo.config.recompile_limit = 256
    loss = torch.compile(published.published_vectorised, fullgraph=True, dynamic=False)
    return _differentiated(inputs.q, lambda: loss(*inputs, case.hard, case.temperature))


def _op(case: Case, inputs: Inputs) -> Step:
    steps = itertools.cycle(torch.arange(_STEPS, device=inputs.q.device).unbind())

    def loss() -> Tensor:
        return infonce(
            *inputs,
            hard=case.hard,
            temperature=case.temperature,
            seed=SEED,
            step=next(steps),
            backend=case.contender,
        ).loss

    return _differentiated(inputs.q, loss)


def _differentiated(q: Tensor, loss: Callable[[], Tensor]) -> Step:
    def step() -> Tensor:
        (gradient,) = torch.autograd.grad(loss(), q)
        return gradient

    return step


def op_flops(case: Case) -> int:
    """4 B K D: two products with the queue. Vectors that no closed form replaces: 2 B S D for `mixed` (n_i . n_j),
    8 for `noisy` (q . e, n . e, e . e and the gradient's share), 4 for `adversarial` (n . sign(q), the share)."""
    hard = case.hard
    vectors = 2 * hard.mixed + 8 * hard.noisy + 4 * hard.adversarial
    return case.batch * case.dim * (4 * case.queue + vectors)


def fused_bytes(case: Case) -> int:
    """A fused kernel's traffic: no logit and no synthetic vector ever reaches memory.

    The queue once for each pass over the rows that fit the workspace, which is one pass where nothing is selected;
    q and k read and the gradient written, in float32; with synthetic negatives, the similarities written and read once
    in the queue's dtype, and each row of a hard set read once more (B N of them, at most the whole queue).
    """
    passes, selection = 1, 0
    if case.hard.total:
        rows = max(1, WORKSPACE // (case.queue * case.element))
        passes = -(-case.batch // rows)
        hard_rows = min(case.batch * case.hard.n_hard, case.queue)
        selection = case.element * (2 * case.batch * case.queue + hard_rows * case.dim)
    return passes * case.queue * case.dim * case.element + 3 * 4 * case.batch * case.dim + selection


def eager_bytes(case: Case) -> int:
    """`eager` counted as the published losses are: each operation of synco_fast/ops/eager.py reads and writes once.

    The queue in float32 twice, and a 16-bit one read and written in float32 first. A similarity, 4 bytes, in the loss:
    written by the product; read by the maximum; three operations of a read and a write make its weight; read by the
    sum, by the gradient's product and by the comparison for the rank, which writes and reads a byte. The selection:
    top-k reads it; two comparisons read 4 and write 1; 5 bytes to combine the tied, 1 to count those above; the two
    running counts read 1 and write 8; compared or decremented, 9 and 16; 6 for the two logical operations; `where`
    reads 9 and writes 8; `scatter_` reads 16; the last count 1. Vectors: parents of `mixed`, 2 x 2 and 3 for their
    product and sum; `noisy`: noise 1, scaling 2, with q 3, the parents and their sum 9, the gradient 1;
    `adversarial`: as much for the parents.
    """
    hard, element = case.hard, case.element
    per_similarity = 4 * (1 + 1 + 6 + 3) + 2
    if hard.total:
        per_similarity += 4 + 10 + 5 + 1 + 18 + 25 + 6 + 17 + 16 + 1
    queue = 4 * 2 if element == 4 else element + 4 * 3
    vectors = 4 * (7 * hard.mixed + 16 * hard.noisy + 9 * hard.adversarial)
    return queue * case.queue * case.dim + per_similarity * case.batch * case.queue + vectors * case.batch * case.dim


BASELINES = {
    "moco_eager": Contender(_moco, published.moco_flops, published.moco_bytes),
    "published": Contender(_published, published.synthetic_flops, published.published_bytes),
    "published_vectorised": Contender(_published_vectorised, published.synthetic_flops, published.vectorised_bytes),
    "compiled": Contender(_compiled, published.synthetic_flops, published.compiled_bytes),
}

OPS = {
    "eager": Contender(_op, op_flops, eager_bytes),
    "cpu": Contender(_op, op_flops, fused_bytes),
    "triton": Contender(_op, op_flops, fused_bytes),
    "cuda": Contender(_op, op_flops, fused_bytes),
}

CONTENDERS = {**BASELINES, **OPS}

_ONLY_ON = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}


def absent(contender: str, device: str) -> str | None:
    """Why a contender cannot take part on a device; None if it can."""
    if contender == "compiled" and importlib.util.find_spec("torch._inductor") is None:
        return "this PyTorch has no inductor"
    if contender not in OPS:
        return None
    only = _ONLY_ON.get(contender, device)
    if only != device:
        note = "; Triton's interpreter is not worth timing" if contender == "triton" else ""
        return f"not a backend for {device}{note}"
    state = backends().get(contender, "not a backend of this version")
    return None if state == "ok" else state


def held_dtype(contender: str, dtype: str, device: str) -> str:
    """The dtype a contender holds the queue in when `dtype` is asked for.

    PyTorch's float16 products on a CPU are a hundred times slower than its float32 ones, and nobody would use them: its
    losses keep a float32 queue there.
    """
    return "float32" if contender in BASELINES and device == "cpu" and dtype == "float16" else dtype
