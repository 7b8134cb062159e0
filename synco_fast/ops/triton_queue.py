# mypy: allow-untyped-defs, allow-incomplete-defs
"""The pass over the queue: similarities, their weights and the weighted sum of the queue's rows, in one kernel.

It is flash attention's forward with the queue as keys and as values. A program takes a tile of queries and a part of
the queue; what it leaves is a partial result (reference, sum of weights, count, weighted sum of rows), and the
partial results are added in their order by the last kernel.
"""

import triton
import triton.language as tl

_HEADROOM = tl.constexpr(14.0)


@triton.jit
def _product(a, b, total, WIDEN: tl.constexpr):
    """total + a @ b in float32. WIDEN: Triton's interpreter cannot multiply bfloat16."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def queue_pass(
    q,  # (B, DIM) in the queue's dtype
    k,  # (B, DIM)
    queue,  # (K, DIM)
    positive,  # out (B,) float32: q . k
    similarity,  # out (B, width) float32: q . n, -inf past the queue's end; if GROUP
    peaks,  # out (B, width / GROUP) float32: the largest similarity of each GROUP neighbouring rows; if GROUP
    part_reference,  # out (B, parts) float32: weights are 2^(logit - reference), logits in units of ln 2
    part_weight,  # out (B, parts) float32: sum of the weights
    part_above,  # out (B, parts) int32: negatives at or above the positive
    part_pull,  # out (B, parts, DIM) float32: sum of weight times row
    rows,  # B
    queue_rows,  # K
    q_stride,
    k_stride,
    queue_stride,
    width,  # K rounded up to COLUMNS
    parts,
    split_rows,  # the part of the queue that one program takes, a multiple of COLUMNS
    scale,  # log2(e) / temperature
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    TERMS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    column, d = tl.arange(0, COLUMNS), tl.arange(0, DIM)
    live = row < rows
    queries = tl.load(q + row[:, None] * q_stride + d[None, :], mask=live[:, None], other=0.0)
    keys = tl.load(k + row[:, None] * k_stride + d[None, :], mask=live[:, None], other=0.0)
    positives = tl.sum(queries.to(tl.float32) * keys.to(tl.float32), axis=1)
    if split == 0:
        tl.store(positive + row, positives, mask=live)

    reference = tl.full((ROWS,), -1e30, tl.float32)
    weight = tl.zeros((ROWS,), tl.float32)
    above = tl.zeros((ROWS,), tl.int32)
    pull = tl.zeros((ROWS, DIM), tl.float32)
    first = split * split_rows
    for start in range(first, min(first + split_rows, queue_rows), COLUMNS):
        inside = start + column < queue_rows
        address = queue + (start + column).to(tl.int64)[:, None] * queue_stride + d[None, :]
        negatives = tl.load(address, mask=inside[:, None], other=0.0)
        s = _product(queries, tl.trans(negatives), tl.zeros((ROWS, COLUMNS), tl.float32), WIDEN)
        s = tl.where(inside[None, :], s, -float("inf"))
        above += tl.sum((s >= positives[:, None]).to(tl.int32), axis=1)
        if GROUP:
            tl.store(similarity + row[:, None] * width + (start + column)[None, :], s, mask=live[:, None])
            group = tl.arange(0, COLUMNS // GROUP)
            tops = tl.max(tl.reshape(s, (ROWS, COLUMNS // GROUP, GROUP)), axis=2)
            place = row[:, None] * (width // GROUP) + start // GROUP + group[None, :]
            tl.store(peaks + place, tops, mask=live[:, None])

        # A weight is an operand of the second product, and 16 bits hold neither its range (at t = 0.02 the weights of
        # one row span e^100) nor its precision. Range: the reference follows the row's largest logit, HEADROOM above
        # it, so that the largest weight so far lies in (2^13, 2^14] and in float16 a weight 2^-38 as large is still
        # not 0. It is a whole number and only grows, so that what was summed is rescaled by a power of two, which
        # does not round. Precision: the weight is split into TERMS numbers of the queue's dtype (float16: 2 of 11
        # bits, bfloat16: 3 of 8), and their products with the queue add up to that of the float32 weight. Rounding
        # it to one number would save a third of the products and make the gradient's error that of 11 (8) bits.
        grown = tl.maximum(reference, tl.ceil(tl.max(s, axis=1) * scale) - _HEADROOM)
        shrink = tl.exp2(reference - grown)
        w = tl.exp2(tl.fma(s, scale, -grown[:, None]))
        weight = weight * shrink + tl.sum(w, axis=1)
        pull = pull * shrink[:, None]
        for _ in tl.static_range(TERMS):
            term = w.to(negatives.dtype)
            pull = _product(term, negatives, pull, WIDEN)
            w -= term.to(tl.float32)
        reference = grown

    place = row * parts + split
    tl.store(part_reference + place, reference, mask=live)
    tl.store(part_weight + place, weight, mask=live)
    tl.store(part_above + place, above, mask=live)
    tl.store(part_pull + place[:, None] * DIM + d[None, :], pull, mask=live[:, None])
