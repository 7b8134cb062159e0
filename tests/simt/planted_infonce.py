"""Mistakes to be planted into the CUDA kernel, one at a time, and what must catch each."""

from dataclasses import dataclass

WRONG = "wrong"  # numbers that disagree with float64
RACE = "WARNING: ThreadSanitizer: data race"
PAST_SHARED = "wrote outside a shared array"
PAST_GLOBAL = "outside of every cudaMalloc"
UNDER_WAY = "cp.async copies under way"


@dataclass(frozen=True)
class Planted:
    """A piece of a kernel file's text, what takes its place, the input that tells, and by what evidence."""

    file: str
    old: str
    new: str
    input: str = "all"
    variant: str = "plain"
    evidence: str = WRONG
    schedule: str = "fwd"
    more: tuple[tuple[str, str], ...] = ()  # further pieces of the file


PASS, NARROW, SELECT = "queue_pass.h", "candidates.h", "selection.h"
SYNTHESIS, FINISH = "synthesis.h", "finish.h"
MATRIX_BARRIER = "    __syncthreads();  // tile t has arrived for all, and nobody reads the stage that is filled next\n"

PLANTED = {
    "no barrier after cp_async_wait": Planted(PASS, MATRIX_BARRIER, ""),
    "no barrier after cp_async_wait, watched": Planted(PASS, MATRIX_BARRIER, "", "race", "threads", RACE),
    "waits for one copy too few": Planted(PASS, "cp_async_wait<T::stages - 2>", "cp_async_wait<T::stages - 1>"),
    "no grid_sync between the phases": Planted(
        "infonce.cu",
        "    grid_sync();\n    clock",
        "    __syncthreads();\n    clock",
    ),
    "no grid_sync before the means": Planted("infonce.cu", "  }\n  grid_sync();\n  clock", "  }\n  clock"),
    "no grid_sync between passes": Planted(
        "infonce.cu", "if (first_row) grid_sync();", "if (first_row) __syncthreads();", "passes", schedule="greedy:1"
    ),
    "what lies beyond the queue is weighed": Planted(PASS, "s[n][i] = exists ? w : 0.f;", "s[n][i] = w;"),
    "what lies beyond the queue is ranked": Planted(PASS, "+= exists && s[n][i] >=", "+= s[n][i] >=", "opposite"),
    "what lies beyond the queue is selected": Planted(
        PASS,
        "column + 1 < left ? s[n][2 * low + 1] : -INFINITY",
        "column + 1 < left ? s[n][2 * low + 1] : 0.f",
        "whole",
    ),
    "a tile loaded over the one in use": Planted(
        PASS, "shared.tiles + (next - begin) % T::stages", "shared.tiles + (t - begin) % T::stages", "units"
    ),
    "rank above, not at or above": Planted(PASS, "s[n][i] >= positive[row]", "s[n][i] > positive[row]", "exact"),
    "weights' fragments swapped": Planted(
        PASS,
        "{pack(low[0], low[1]), pack(low[2], low[3]), pack(high",
        "{pack(low[2], low[3]), pack(low[0], low[1]), pack(high",
    ),
    "sums stored to the wrong row": Planted(
        PASS,
        "const int row = tile_row + lane_id() / 4 + 8 * low;",
        "const int row = tile_row + lane_id() / 4 + 8 - 8 * low;",
    ),
    "pull not rescaled": Planted(PASS, "sums.pull[n][2 * low + 1] *= factor;", "", "sharp"),
    "weight not rescaled": Planted(PASS, "sums.weight[low] *= factor;", "", "sharp"),
    "exponent dropped": Planted(
        PASS, "const float scale = exp2_approx(sums.exponent[low]);", "const float scale = 1.f;", "sharp"
    ),
    "ties to the higher row": Planted(
        SELECT,
        "before.equal = block_scan(lane_id() == 31 ? warp_equal : 0, shared.scan).before;",
        "const Scanned ties = block_scan(lane_id() == 31 ? warp_equal : 0, shared.scan);\n"
        "  before.equal = ties.before - (ties.total - threshold.equal);",
        "exact",
        more=(
            ("(is_equal && lane.equal < threshold.equal)", "(is_equal && lane.equal >= 0)"),
            ("min(lane.equal, threshold.equal)", "max(lane.equal, 0)"),
        ),
    ),
    "ties never split": Planted(SELECT, "room == low.inside, 0, 0}", "true, 0, 0}", "ties", evidence=PAST_GLOBAL),
    "ties not split in float32": Planted(
        SELECT, "key > threshold.bound) << i", "false) << i", "ties", evidence=PAST_GLOBAL
    ),
    "ties split among all": Planted(
        SELECT, "shift == 21 || key >> (shift + bits) == prefix", "true", "ties", evidence=PAST_GLOBAL
    ),
    "similarities read before they have come": Planted(NARROW, "  cp_async_wait<0>();  //", "  //", evidence=UNDER_WAY),
    "the next row's similarities over this one's": Planted(
        FINISH,
        "    hard_sum = write_hard_set",
        "    if (next >= 0) bring_similarities(a, p, shared.selection, next);\n    hard_sum = write_hard_set",
        "unnarrowed",
        evidence=PAST_GLOBAL,
    ),
    "candidates of another chunk": Planted(NARROW, "[place] = i * 8 + element;", "[place] = first * 8 + element;"),
    "candidates of a warp over those of another": Planted(NARROW, "int before = warps.before;", "int before = 0;"),
    "what equals the bound is no candidate": Planted(
        NARROW, "unsigned mask = i < segment.end ? at_least", "unsigned mask = i < segment.end ? ~1u & at_least"
    ),
    "more candidates than there is room for": Planted(
        NARROW, " || warps.total > max_candidates(n)", "", "collapsed", evidence=PAST_GLOBAL
    ),
    "no barrier after the candidates are written": Planted(
        NARROW, "  __syncthreads();\n  return {nullptr", "  return {nullptr", "race", "threads", RACE
    ),
    "histogram not cleared": Planted(NARROW, "shared.histogram[first - i] = 0;", "", evidence=PAST_GLOBAL),
    "scan scratch reused at once": Planted(
        NARROW, "  __syncthreads();\n  return {before, total};", "  return {before, total};", "race", "threads", RACE
    ),
    "row kept past its end": Planted(
        FINISH,
        "arena.take<uint4>(p.keep_row ? p.row_stride / 8 : 0)",
        "arena.take<uint4>(p.keep_row ? p.row_stride / 8 - 8 : 0)",
        evidence=PAST_SHARED,
    ),
    "second parent is the first": Planted(SYNTHESIS, "shared.draws[i].second", "shared.draws[i].first"),
    "noise one quad on": Planted(SYNTHESIS, "share_start<dim>(c) / 4 + quad", "share_start<dim>(c) / 4 + quad + 1"),
    "a repeated synthetic negative counts": Planted(
        SYNTHESIS,
        "counts ? exp2_approx(form.similarity * query.log2e_over_t) : 0.f",
        "exp2_approx(form.similarity * query.log2e_over_t)",
    ),
    "no barrier before draws are overwritten": Planted(
        SYNTHESIS, "      __syncthreads();  // the draws before may still be read\n", "", "many", "threads", RACE
    ),
    "seed's high word dropped": Planted(
        SYNTHESIS, "a.hard.n_hard, a.seed, row", "a.hard.n_hard, a.seed & 0xffffffffu, row"
    ),
    "part of a row never written": Planted(
        "infonce.cu",
        "p.row_stride = divide_up(queue_rows, tile_columns(dim)) * tile_columns(dim);",
        "p.row_stride = divide_up(queue_rows, tile_columns(dim)) * tile_columns(dim) + 64;",
    ),
    "step dropped": Planted(FINISH, "share.step = static_cast<uint32_t>(load_global(a.step));", "share.step = 0;"),
    "row offset dropped": Planted(FINISH, "share.row = a.row_offset + ", "share.row = "),
    "tile read past the queue": Planted(
        PASS,
        "const bool valid = first_row + row < a.queue_rows;",
        "const bool valid = true;",
        variant="sanitized",
        evidence=PAST_GLOBAL,
    ),
}
