# mypy: allow-untyped-defs, allow-incomplete-defs
"""Each query's partial results added up: its loss, gradient, ranks and statistics, in one kernel."""

import triton
import triton.language as tl

_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def finish(
    q_dot_k,  # (B,) float32
    k,  # (B, DIM)
    part_reference,  # (B, parts) and (B, parts, DIM), see triton_queue.py: first the queue's, then the synthetic ones
    part_weight,
    part_above,
    part_pull,
    drawn,  # (parts - splits, 4) int32: the last column is the kind's place among those in use
    hard_similarity,  # (B,) float32
    grad,  # out (B, DIM) float32
    rank,  # out (B,) int64
    rank_all,  # out (B,) int64
    columns,  # out (1 + statistics, column_stride) float32: each query's loss and statistics
    k_stride,
    column_stride,
    parts,
    splits,
    scale,  # log2(e) / temperature
    share,  # 1 / (batch size times temperature)
    KINDS: tl.constexpr,
    DIM: tl.constexpr,
    PARTS: tl.constexpr,  # parts rounded up to a power of two
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0)
    part, d = tl.arange(0, PARTS), tl.arange(0, DIM)
    place, inside = row * parts + part, part < parts
    positive = tl.load(q_dot_k + row)
    reference = tl.load(part_reference + place, mask=inside, other=-float("inf"))
    peak = tl.maximum(tl.max(reference, axis=0), positive * scale)
    weight = tl.load(part_weight + place, mask=inside, other=0.0) * tl.exp2(reference - peak)
    positive_weight = tl.exp2(tl.fma(positive, scale, -peak))
    total = positive_weight + tl.sum(weight, axis=0)

    pull = tl.zeros((DIM,), tl.float32)
    for start in range(0, parts, CHUNK):
        chunk = start + tl.arange(0, CHUNK)
        address = row * parts + chunk
        grow = tl.exp2(tl.load(part_reference + address, mask=chunk < parts, other=-float("inf")) - peak)
        sums = tl.load(part_pull + address[:, None] * DIM + d[None, :], mask=(chunk < parts)[:, None], other=0.0)
        pull += tl.sum(grow[:, None] * sums, axis=0)
    key = tl.load(k + row * k_stride + d).to(tl.float32)
    tl.store(grad + row * DIM + d, ((pull + positive_weight * key) / total - key) * share)

    above = tl.load(part_above + place, mask=inside, other=0)
    real = tl.sum(tl.where(part < splits, above, 0), axis=0)
    tl.store(rank + row, real.to(tl.int64))
    tl.store(rank_all + row, tl.sum(above, axis=0).to(tl.int64))

    # In the order of stat_names, after the loss.
    columns += row
    tl.store(columns, (tl.log2(total) + tl.fma(-positive, scale, peak)) * _LN2)
    tl.store(columns + column_stride, (real < 1).to(tl.float32))
    tl.store(columns + 2 * column_stride, (real < 5).to(tl.float32))
    tl.store(columns + 3 * column_stride, positive)
    tl.store(columns + 4 * column_stride, positive_weight / total)
    tl.store(columns + 5 * column_stride, tl.sum(tl.where(part < splits, weight, 0.0), axis=0) / total)
    if KINDS:
        synthetic = (part >= splits) & inside
        owner = tl.load(drawn + (part - splits) * 4 + 3, mask=synthetic, other=-1)
        for kind in tl.static_range(KINDS):
            mass = tl.sum(tl.where(owner == kind, weight, 0.0), axis=0) / total
            tl.store(columns + (6 + kind) * column_stride, mass)
        tl.store(columns + (6 + KINDS) * column_stride, tl.sum(tl.where(synthetic, weight, 0.0), axis=0) / total)
        tl.store(columns + (7 + KINDS) * column_stride, tl.load(hard_similarity + row))
