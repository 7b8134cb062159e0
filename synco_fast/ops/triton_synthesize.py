# mypy: allow-untyped-defs, allow-incomplete-defs
"""The synthetic negatives of a query: drawn, built in registers, weighed and summed, in one kernel.

All kinds have one form, v = on_query q + on_first n_i + on_second n_j + noise e + sign sign(q), whose coefficients are
affine in the one that is drawn. A program makes one part: up to SAMPLES vectors of one kind for one query, from a row
of the tables in triton_infonce.py. It reads each parent's row once; no vector leaves the registers. What it leaves is
a partial result like those of the pass over the queue.
"""

import triton
import triton.language as tl

from synco_fast.ops.triton_philox import draw, normals, philox


@triton.jit
def _rows(queue, index, stride, d):
    """(S, DIM) float32: rows of the queue."""
    return tl.load(queue + index.to(tl.int64)[:, None] * stride + d[None, :]).to(tl.float32)


@triton.jit(do_not_specialize=["seed", "row_offset"])
def synthesize(
    q,  # (B, DIM) in the queue's dtype
    queue,  # (K, DIM)
    hard_set,  # (B, n_hard) int32 rows of the queue, ascending
    positive,  # (B,) float32
    step,  # int64 scalar
    drawn,  # (parts, 4) int32: the kind's number, first sample, end of samples, the kind's place among those in use
    built,  # (parts, 10) float32: see _tables in triton_infonce.py
    part_reference,  # out (B, parts) and (B, parts, DIM), as in triton_queue.py, from part first_part on
    part_weight,
    part_above,
    part_pull,
    seed,
    row_offset,
    n_hard,
    q_stride,
    queue_stride,
    parts,
    first_part,
    scale,  # log2(e) / temperature
    least_norm2,
    MIXED: tl.constexpr,  # numbers of the kinds that need more than one parent and the query
    NOISY: tl.constexpr,
    DIM: tl.constexpr,
    SAMPLES: tl.constexpr,
):
    row, part = tl.program_id(0), tl.program_id(1)
    drawn += part * 4
    built += part * 10
    number, end = tl.load(drawn), tl.load(drawn + 2)
    sample = tl.load(drawn + 1) + tl.arange(0, SAMPLES)
    d = tl.arange(0, DIM)

    # Counter words: (global row, sample, kind | block << 8, step), as in draws.py.
    c0, c1, c2 = (row_offset + row).to(tl.uint32), sample.to(tl.uint32), number.to(tl.uint32)
    c3 = tl.load(step).to(tl.uint32)
    first_place, second_place, c = draw(seed, c0, c1, c2, c3, n_hard, tl.load(built), tl.load(built + 1))
    on_query = tl.load(built + 2) + tl.load(built + 3) * c
    on_first = tl.load(built + 4) + tl.load(built + 5) * c
    on_second = tl.load(built + 6) + tl.load(built + 7) * c

    query = tl.load(q + row * q_stride + d).to(tl.float32)
    sign = tl.where(query > 0, 1.0, tl.where(query < 0, -1.0, 0.0))
    parents = hard_set + row * n_hard
    first = _rows(queue, tl.load(parents + first_place), queue_stride, d)
    v = on_query[:, None] * query[None, :] + on_first[:, None] * first + (tl.load(built + 9) * sign)[None, :]
    if number == MIXED:
        second = _rows(queue, tl.load(parents + second_place), queue_stride, d)
        v += on_second[:, None] * second
    if number == NOISY:
        block = (number + ((1 + tl.arange(0, DIM // 4)) << 8)).to(tl.uint32)
        w0, w1, w2, w3 = philox(seed, c0, c1[:, None], block[None, :], c3)
        v += tl.load(built + 8) * normals(w0, w1, w2, w3)

    shorten = tl.rsqrt(tl.maximum(tl.sum(v * v, axis=1), least_norm2))
    s = tl.sum(v * query[None, :], axis=1) * shorten
    live = sample < end
    reference = tl.max(tl.where(live, s * scale, -float("inf")), axis=0)
    w = tl.where(live, tl.exp2(tl.fma(s, scale, -reference)), 0.0)
    place = row * parts + first_part + part
    tl.store(part_reference + place, reference)
    tl.store(part_weight + place, tl.sum(w, axis=0))
    tl.store(part_above + place, tl.sum((live & (s >= tl.load(positive + row))).to(tl.int32), axis=0))
    tl.store(part_pull + place * DIM + d, tl.sum((w * shorten)[:, None] * v, axis=0))
