"""The `triton` backend: for CUDA GPUs on machines without a compiler; in Triton's interpreter also on a CPU, for tests.

Fused, a kernel each: the pass over the queue (similarities, softmax, product with the queue, ranks); the selection of
the hard set, in two runs; draws, synthesis and weights of the synthetic negatives; loss, gradient and statistics.
Never materialised: the queue's weights, the synthetic vectors, their noise and their logits. Materialised: the float32
similarities of as many queries at a time as WORKSPACE holds, the maxima of their groups, and the partial results; for
MoCo, which selects nothing, the partial results alone.

The same bits come out of every run with the same shapes: no sum hangs on the order in which programs run. The host
reads nothing from the device. Kernels are imported at first use, so this module does not need Triton to be installed.
"""

import functools
import os
from typing import NamedTuple

import torch
from torch import Tensor

from synco_fast.ops.draws import coefficient_range
from synco_fast.ops.hard import KINDS, HardNegatives, terms
from synco_fast.ops.numbers import MIN_NORM, MIN_TEMPERATURE
from synco_fast.ops.result import stat_names

DIMS = (16, 32, 64, 128, 256)
MAX_QUEUE_ROWS = 2**20
MAX_N_HARD = 4096
MAX_SYNTHETIC = 16384
WORKSPACE = 64 * 2**20
"""Bytes of similarities at most; where the batch needs more, it is taken in passes of fewer rows."""

# Rows of a pass: with at most MAX_SYNTHETIC, every offset into the partial results then fits in 32 bits.
_MAX_ROWS = 4096
# Programs of the pass over the queue: some two for each multiprocessor of the largest GPUs. A number of its own and
# not the device's, so that the sums are split alike on all of them.
_PROGRAMS = 256
_TERMS = {torch.float16: 2, torch.bfloat16: 3, torch.float32: 1}


def status() -> str:
    """ "ok", or why this backend cannot be used here."""
    try:
        if _interpreted():
            return "ok"
    except ImportError:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET was set after triton had been imported: set it before Python starts"
    if not torch.cuda.is_available():
        return "no CUDA device (TRITON_INTERPRET=1 runs it on the CPU, for tests)"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return "Triton needs a GPU of compute capability 8.0 or later"
    return "ok"


def objection(queue: Tensor, hard: HardNegatives, temperature: float) -> str | None:
    """Why this backend, where it can be used, does not take a call; None if it does."""
    if queue.device.type != "cuda" and not _interpreted():
        return f"it needs tensors on a CUDA device, got {queue.device}"
    if queue.dtype not in _TERMS:
        return f"queue must be float16, bfloat16 or float32, got {queue.dtype}"
    if queue.shape[1] not in DIMS:
        return f"queue must have {', '.join(map(str, DIMS))} columns, got {queue.shape[1]}"
    if len(queue) > MAX_QUEUE_ROWS:
        return f"queue must have at most {MAX_QUEUE_ROWS} rows, got {len(queue)}"
    if hard.n_hard > MAX_N_HARD:
        return f"n_hard must be at most {MAX_N_HARD}, got {hard.n_hard}"
    if hard.total > MAX_SYNTHETIC:
        return f"there must be at most {MAX_SYNTHETIC} synthetic negatives, got {hard.total}"
    if temperature < MIN_TEMPERATURE:
        return f"temperature must be at least {MIN_TEMPERATURE}, got {temperature}"
    return None


def infonce(
    q: Tensor,
    k: Tensor,
    queue: Tensor,
    hard: HardNegatives,
    temperature: float,
    seed: int,
    step: Tensor,
    row_offset: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, its gradient with respect to q (float32), rank, rank_all and statistics. Arguments as in the op."""
    # Rounded once. Rows may lie apart, but the elements of a row may not.
    q, k, queue = (_with_dense_rows(tensor.detach()) for tensor in (q.to(queue.dtype), k, queue))
    grad = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    rank = torch.empty(len(q), dtype=torch.int64, device=q.device)
    rank_all = torch.empty_like(rank)
    columns = torch.empty((1 + len(stat_names(hard)), len(q)), dtype=torch.float32, device=q.device)

    at_once = min(_MAX_ROWS, max(1, WORKSPACE // (4 * _width(queue)))) if hard.total else _MAX_ROWS
    with torch.cuda.device_of(q):
        for start in range(0, len(q), at_once):
            rows = slice(start, start + at_once)
            out = (grad[rows], rank[rows], rank_all[rows], columns[:, rows])
            _rows(q[rows], k[rows], queue, hard, temperature, seed, step, row_offset + start, len(q), out)
    return columns[0].mean(), grad, rank, rank_all, columns[1:].mean(dim=1)


def _interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels; Triton decides that when it is imported."""
    import triton.language

    return not isinstance(triton.language.sum, triton.runtime.JITFunction)


def _with_dense_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


class _Tile(NamedTuple):
    """The pass over the queue: queries at most and rows of the queue in a tile, and how it is run."""

    rows: int
    columns: int
    warps: int
    stages: int


def _tile(queue: Tensor) -> _Tile:
    """Within the 99 KiB of shared memory that every supported GPU has."""
    if queue.dtype == torch.float32:  # No tensor cores: exact products, operand by operand.
        return _Tile(rows=16, columns=32, warps=8, stages=1)
    return _Tile(rows=64, columns=64 if queue.shape[1] <= 128 else 32, warps=4, stages=3)


def _width(queue: Tensor) -> int:
    """Columns of the similarities: the queue's rows, up to a whole tile."""
    columns = _tile(queue).columns
    return -(-len(queue) // columns) * columns


def _rows(
    q: Tensor,
    k: Tensor,
    queue: Tensor,
    hard: HardNegatives,
    temperature: float,
    seed: int,
    step: Tensor,
    row_offset: int,
    batch: int,
    out: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    """All of it for some rows of the batch: `out` is their gradient, rank, rank_all and columns."""
    from synco_fast.ops.triton_finish import finish
    from synco_fast.ops.triton_queue import queue_pass

    (rows, dim), tile, width = q.shape, _tile(queue), _width(queue)
    tile_rows, tiles = min(tile.rows, max(16, _power_of_2(rows))), width // tile.columns
    row_tiles = -(-rows // tile_rows)
    split_tiles = -(-tiles // max(1, min(_PROGRAMS // row_tiles, tiles)))
    splits = -(-tiles // split_tiles)
    samples = max(16, 4096 // dim)  # 4096 elements, 32 for each thread.
    drawn, built = _tables(hard, samples, q.device)
    parts = splits + len(drawn)
    scale = 1.4426950408889634 / temperature

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=q.device)

    positive, hard_similarity = empty(rows), empty(rows)
    partial = (empty(rows, parts), empty(rows, parts), empty(rows, parts, dtype=torch.int32), empty(rows, parts, dim))
    group = _group(len(queue), hard.n_hard) if hard.total else 0
    similarity = empty(rows, width) if group else positive
    peaks = empty(rows, width // group) if group else positive
    queue_pass[(row_tiles, splits)](
        *(q, k, queue, positive, similarity, peaks, *partial),
        *(rows, len(queue), q.stride(0), k.stride(0), queue.stride(0), width, parts, split_tiles * tile.columns, scale),
        DIM=dim,
        ROWS=tile_rows,
        COLUMNS=tile.columns,
        GROUP=group,
        TERMS=_TERMS[queue.dtype],
        WIDEN=queue.dtype == torch.bfloat16 and _interpreted(),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if group:
        from synco_fast.ops.triton_synthesize import synthesize

        hard_set = _select(similarity, peaks, group, len(queue), hard.n_hard, hard_similarity)
        synthesize[(rows, len(drawn))](
            *(q, queue, hard_set, positive, step, drawn, built, *partial, seed, row_offset),
            *(hard.n_hard, q.stride(0), queue.stride(0), parts, splits, scale, MIN_NORM**2),
            MIXED=KINDS.index("mixed"),
            NOISY=KINDS.index("noisy"),
            DIM=dim,
            SAMPLES=samples,
            num_warps=4,
        )
    grad, rank, rank_all, columns = out
    finish[(rows,)](
        *(positive, k, *partial, drawn, hard_similarity, grad, rank, rank_all, columns),
        *(k.stride(0), columns.stride(0), parts, splits, scale, 1 / (batch * temperature)),
        KINDS=len(hard.kinds),
        DIM=dim,
        PARTS=_power_of_2(parts),
        CHUNK=samples,
        num_warps=4,
    )


def _select(
    similarity: Tensor, peaks: Tensor, group: int, queue_rows: int, n_hard: int, hard_similarity: Tensor
) -> Tensor:
    """The hard set of each row (B, n_hard) int32; its mean similarity goes to hard_similarity (B,)."""
    from synco_fast.ops.triton_select import select

    def run(values: Tensor, groups: Tensor, length: int, columns: int, n: int, size: int) -> Tensor:
        chosen = torch.empty((len(values), n), dtype=torch.int32, device=values.device)
        tile = min(8192, max(128, _power_of_2(length)))
        select[(len(values),)](
            *(values, groups, chosen, hard_similarity, length, columns, values.stride(0), n),
            GROUP=size,
            TILE=tile,
            SCAN=min(tile, 2048),
            ONE_TILE=length <= tile,
            num_warps=max(4, tile // 512),
        )
        return chosen

    groups = -(-queue_rows // group)
    n_groups = min(n_hard, groups)
    chosen = run(peaks, peaks, groups, groups, n_groups, 1)
    return run(similarity, chosen, n_groups * group, queue_rows, n_hard, group)


def _group(queue_rows: int, n_hard: int) -> int:
    """Neighbours in a group: about sqrt(K / n), the power of two below, so that both selections are of one length."""
    group = 2
    while group < 32 and 4 * group * group * n_hard <= queue_rows:
        group *= 2
    return group


@functools.lru_cache(maxsize=64)
def _tables(hard: HardNegatives, samples: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """What each part of the synthetic negatives is: at most `samples` of one kind.

    Returns:
        (parts, 4) int32: the kind's number, first sample, end of samples, the kind's place among those in use.
        (parts, 10) float32: lower end and length of the coefficient's interval; on_query, on_first and on_second as
        constant and slope in the coefficient; the noise's and the sign's coefficients.
    """
    drawn, built = [], []
    for place, kind in enumerate(hard.kinds):
        low, high = coefficient_range(kind, hard)
        # The coefficients are affine: taken at 0 and at 1. A kind with one parent has nothing on the second.
        at_0, at_1 = ((t.query, *t.parents, 0.0)[:3] for t in (terms(kind, 0.0, hard), terms(kind, 1.0, hard)))
        affine = [x for a, b in zip(at_0, at_1, strict=True) for x in (a, b - a)]
        noise, sign = hard.sigma * (kind == "noisy"), hard.eta * (kind == "adversarial")
        for first in range(0, hard.count(kind), samples):
            drawn.append((KINDS.index(kind), first, min(first + samples, hard.count(kind)), place))
            built.append((low, high - low, *affine, noise, sign))
    return (
        torch.tensor(drawn, dtype=torch.int32, device=device).view(-1, 4),
        torch.tensor(built, dtype=torch.float32, device=device).view(-1, 10),
    )


def _power_of_2(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << (n - 1).bit_length()
