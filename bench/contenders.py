"""Who is compared: for each contender, how its step is built, what it must compute and move, and why it may be absent.

A step is the loss, forward, and its gradient with respect to q, backward.
"""

import importlib.util
import itertools
import math
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


# Operations are two for a multiply-add of vectors of D. Bytes are the least that the contender's way of working moves:
# what it must fetch from or leave in memory, if nothing but a tile stays in a cache between two uses. (More may stay
# there: then a contender can beat its floor.) Not counted: numbers by the row, and the partial sums of the GPU kernels'
# splits, whose number is a choice of the launch. Each ends with q and k read and the gradient written, in float32.

_WORKSPACE = 2**26
"""Bytes of similarities that `cuda` and `triton` keep at a time; a batch that needs more takes further passes."""

_CPU_TILE, _CPU_TILE_COLUMNS, _CPU_TASKS = 128, 512, 8
_CUDA_TILE = 128
_TRITON_TILES = {"float32": 16, "float16": 64, "bfloat16": 64}
_TRITON_TERMS = {"float32": 1, "float16": 2, "bfloat16": 3}


def eager_flops(case: Case) -> int:
    """4 B K D: two products with the queue; n . n of each of its rows, if something is selected. 2 B S D for `mixed`
    (n_i . n_j), 8 for `noisy` (q . e, n . e, e . e, the share in the gradient), 4 for `adversarial` (n . sign(q), the
    share)."""
    hard = case.hard
    vectors = 2 * hard.mixed + 8 * hard.noisy + 4 * hard.adversarial
    norms = 2 * case.queue if hard.total else 0
    return case.dim * (4 * case.batch * case.queue + norms + case.batch * vectors)


def eager_bytes(case: Case) -> int:
    """Each operation of synco_fast/ops/eager.py reads its inputs once and writes its result once, as the published
    losses are counted; tests/bench/test_counts.py watches the operations. B N numbers count as nothing.

    The queue is read by two products, in float32; a 16-bit one is read and written in float32 before. Its rows' squares
    are written and summed. A similarity, 4 bytes, in the loss: written by the product; read by the maximum; three
    operations make its weight, each a read and a write; read by the sum, by the gradient's product and by the
    comparison for the rank, which leaves a byte that is read. In the selection: top-k reads it; two comparisons read it
    and write a byte each; one of them is read and written again; the 4-byte key is written, read and written, by two
    `where` that read a byte each; the second top-k reads it.

    A synthetic negative: 2260 bytes, of which 1800 are Philox's (ten rounds on int64 words), the rest its coefficient,
    parent and closed form; 320 more for a second parent. An element of (B, S, D), in float32: `mixed` 8 passes (two
    rows gathered, their product and its sum); `adversarial` 9 (a row gathered, doubled, the sign added, times the sign,
    summed); `noisy` 17 (the same, scaling, q . e and the gradient's share), and 540 bytes for Philox and Box-Muller.
    """
    hard, element = case.hard, case.element
    queue = 4 * 2 + (0 if element == 4 else element + 4)
    per_similarity = 4 * (1 + 1 + 6 + 3) + 2
    if hard.total:
        queue += 4 * 3
        per_similarity += 4 + 2 * 5 + 2 + (1 + 4) + (1 + 8) + 4
    vectors = 4 * (8 * hard.mixed + 9 * hard.adversarial + 17 * hard.noisy) + 540 * hard.noisy
    per_query = per_similarity * case.queue + 2260 * hard.total + 320 * hard.mixed + vectors * case.dim
    return queue * case.queue * case.dim + case.batch * per_query + _ends(case)


def cpu_flops(case: Case) -> int:
    """4 B K D; n . n and the share in the gradient of each hard row that is drawn; 2 B S D for `mixed` (n_i . n_j), 8
    for `noisy` (q . e, n . e, e . e, the share), 2 for `adversarial` (n . sign(q))."""
    hard = case.hard
    vectors = 2 * hard.mixed + 8 * hard.noisy + 2 * hard.adversarial
    return case.batch * case.dim * (4 * case.queue + 4 * _drawn(case) + vectors)


def cpu_bytes(case: Case) -> int:
    """The queue once for each row tile; each split's sum of rows, and its candidates for the hard set (a similarity and
    a row number), written and read; the rows that are drawn. No similarity leaves its tile."""
    row_tiles = _row_tiles(case.batch, _CPU_TILE)
    splits = min(-(-_CPU_TASKS // row_tiles), -(-case.queue // _CPU_TILE_COLUMNS))
    candidates = (4 + 4) * case.hard.n_hard if case.hard.total else 0
    partial = splits * case.batch * 2 * (4 * case.dim + candidates)
    return row_tiles * _queue(case) + partial + _drawn_bytes(case) + _ends(case)


def cuda_flops(case: Case) -> int:
    """4 B K D; q . n, n . n and the share of each parent; the rest as on the CPU."""
    hard = case.hard
    vectors = 6 * (hard.total + hard.mixed) + 2 * hard.mixed + 8 * hard.noisy + 2 * hard.adversarial
    return case.batch * case.dim * (4 * case.queue + vectors)


def cuda_bytes(case: Case) -> int:
    """The queue once for each row tile; if something is selected, similarities in float16 written and read once, and
    the rows that are drawn."""
    return _on_gpu(case, _CUDA_TILE, element=2, similarities=2 * case.queue)


def triton_flops(case: Case) -> int:
    """2 B K D, and as much for each number of the queue's dtype that a weight is split into. A vector is built, from
    the query and one parent, two, or one and noise; then v . v, q . v and its share."""
    hard = case.hard
    vectors = 10 * hard.total + 2 * (hard.mixed + hard.noisy)
    return case.batch * case.dim * (2 * (1 + _TRITON_TERMS[case.dtype]) * case.queue + vectors)


def triton_bytes(case: Case) -> int:
    """The queue once for each row tile; if something is selected, similarities in float32 written, the maxima of groups
    of sqrt(K / N) written and read, N groups read; and the rows that are drawn."""
    similarities = case.queue + 3 * math.isqrt(case.queue * case.hard.n_hard)
    return _on_gpu(case, _TRITON_TILES[case.dtype], element=4, similarities=similarities)


def _on_gpu(case: Case, tile: int, *, element: int, similarities: int) -> int:
    """Bytes, with this many similarities of `element` bytes written or read for each query."""
    if not case.hard.total:
        return _row_tiles(case.batch, tile) * _queue(case) + _ends(case)
    held = max(1, _WORKSPACE // (element * case.queue))
    selection = element * case.batch * similarities + _drawn_bytes(case)
    return _row_tiles(case.batch, min(tile, held)) * _queue(case) + selection + _ends(case)


def _row_tiles(batch: int, rows: int) -> int:
    return -(-batch // rows)


def _queue(case: Case) -> int:
    return case.element * case.queue * case.dim


def _ends(case: Case) -> int:
    return 3 * 4 * case.batch * case.dim


def _drawn(case: Case) -> int:
    """Rows of a query's hard set that are somebody's parent, in the mean: each draw misses a row with 1 - 1 / N."""
    n, draws = case.hard.n_hard, case.hard.total + case.hard.mixed
    return round(n * (1 - (1 - 1 / n) ** draws)) if draws else 0


def _drawn_bytes(case: Case) -> int:
    """Those of all queries, each row of the queue once at most."""
    return case.element * case.dim * min(case.batch * _drawn(case), case.queue)


BASELINES = {
    "moco_eager": Contender(_moco, published.moco_flops, published.moco_bytes),
    "published": Contender(_published, published.synthetic_flops, published.published_bytes),
    "published_vectorised": Contender(_published_vectorised, published.synthetic_flops, published.vectorised_bytes),
    "compiled": Contender(_compiled, published.synthetic_flops, published.compiled_bytes),
}

OPS = {
    "eager": Contender(_op, eager_flops, eager_bytes),
    "cpu": Contender(_op, cpu_flops, cpu_bytes),
    "triton": Contender(_op, triton_flops, triton_bytes),
    "cuda": Contender(_op, cuda_flops, cuda_bytes),
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
