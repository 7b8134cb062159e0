# mypy: allow-untyped-defs, allow-incomplete-defs
"""Exact selection of a row's n largest similarities, ties to the lower index, in ascending order of index.

It runs twice. The similarities stand in groups of neighbours whose maxima are known. The hard set lies within the n
groups of largest maximum, ties to the lower group: for an entry of any other group, each of those n groups holds one
that is larger, or as large and of lower index. So the n groups are selected first, and then the hard set among their
entries; with groups of about sqrt(K / n) both lists are of length sqrt(K n), and most of the row is never read again.
"""

import triton
import triton.language as tl


@triton.jit
def _sortable(values, inside):
    """float32 to uint32 > 0 of the same order, -0.0 like 0.0; 0 where not inside."""
    bits = tl.where(values == 0.0, 0.0, values).to(tl.uint32, bitcast=True)
    keys = tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    keys = tl.where(keys == 0, tl.full((), 1, tl.uint32), keys)
    return tl.where(inside, keys, tl.full((), 0, tl.uint32))


@triton.jit
def _candidates(start, values, groups, length, columns, GROUP: tl.constexpr, TILE: tl.constexpr):
    """Index, value and sortable key of the candidates start, start + 1, ...: all columns, or those of the groups."""
    place = start + tl.arange(0, TILE)
    inside = place < length
    index = place
    if GROUP > 1:
        index = tl.load(groups + place // GROUP, mask=inside, other=0) * GROUP + place % GROUP
        inside = inside & (index < columns)
    value = tl.load(values + index, mask=inside, other=0.0)
    return index, value, _sortable(value, inside)


@triton.jit
def _keys(start, values, groups, length, columns, GROUP: tl.constexpr, TILE: tl.constexpr):
    return _candidates(start, values, groups, length, columns, GROUP, TILE)[2]


@triton.jit
def select(
    values,  # (B, stride) float32
    groups,  # (B, length / GROUP) int32 ascending: groups of GROUP columns to choose from; if GROUP > 1
    chosen,  # out (B, n) int32 ascending columns
    mean,  # out (B,) float32: mean of the chosen values
    length,  # number of candidates
    columns,  # columns of values that count
    stride,
    n,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    SCAN: tl.constexpr,
    ONE_TILE: tl.constexpr,  # length <= TILE: read the candidates once
):
    row = tl.program_id(0)
    values += row * stride
    groups += row * (length // GROUP)
    chosen += row * n
    if ONE_TILE:
        kept = _keys(0, values, groups, length, columns, GROUP, TILE)

    # The threshold is the largest key that at least n keys reach; it is found bit by bit from the top.
    threshold, bit = tl.full((), 0, tl.uint32), tl.full((), 0x80000000, tl.uint32)
    for _ in range(32):
        tried = threshold | bit
        reach = 0
        if ONE_TILE:
            reach += tl.sum((kept >= tried).to(tl.int32), axis=0)
        else:
            for start in range(0, length, TILE):
                keys = _keys(start, values, groups, length, columns, GROUP, TILE)
                reach += tl.sum((keys >= tried).to(tl.int32), axis=0)
        threshold = tl.where(reach >= n, tried, threshold)
        bit = bit >> 1

    # Smaller tiles from here on: what a scan keeps in registers is several times what a count does.
    room = n
    for start in range(0, length, SCAN):
        keys = _keys(start, values, groups, length, columns, GROUP, SCAN)
        room -= tl.sum((keys > threshold).to(tl.int32), axis=0)

    taken_before = 0
    ties_before = 0
    total = 0.0
    for start in range(0, length, SCAN):
        index, value, keys = _candidates(start, values, groups, length, columns, GROUP, SCAN)
        tied = (keys == threshold).to(tl.int32)
        taken = (keys > threshold) | ((tied > 0) & (ties_before + tl.cumsum(tied, axis=0) <= room))
        place = taken_before + tl.cumsum(taken.to(tl.int32), axis=0) - 1
        tl.store(chosen + place, index, mask=taken)
        taken_before += tl.sum(taken.to(tl.int32), axis=0)
        ties_before += tl.sum(tied, axis=0)
        total += tl.sum(tl.where(taken, value, 0.0), axis=0)
    tl.store(mean + row, total / n)
