"""Mistakes to be planted into the augmentation's CUDA kernel, one at a time, and what must catch each."""

from tests.simt.planted_infonce import PAST_GLOBAL, PAST_SHARED, RACE, Planted

DIVERGED = "barrier divergence"
BLUR_BARRIER = "    __syncthreads();  // what is read now has been written, and what is written now has been read\n"
FOOTPRINTS = "    prepare_footprints(shared.item->view, plan.size, share);\n"
FOOTPRINT_BARRIER = f"{FOOTPRINTS}    __syncthreads();\n"
SUM_BARRIER = "  __syncthreads();\n  const uint32_t sum = __reduce"


def planted(old: str, new: str, *, variant: str = "plain", evidence: str = "wrong", schedule: str = "fwd") -> Planted:
    return Planted("view.cu", old, new, variant=variant, evidence=evidence, schedule=schedule)


PLANTED = {
    "no barrier between blur passes": planted(BLUR_BARRIER, ""),
    "no barrier before the mean": planted(SUM_BARRIER, "  const uint32_t sum = __reduce"),
    "no barrier before the next sum": planted(
        "  __syncthreads();  // before the next sum is written there\n", "", schedule="greedy:1"
    ),
    "no barrier after the footprints": planted(FOOTPRINT_BARRIER, FOOTPRINTS),
    "no barrier after a view": planted(
        "    __syncthreads();  // before the next view takes its place\n", "", evidence=DIVERGED
    ),
    "clamp one pixel too far": planted("max(at + k, 0), size - 1)", "max(at + k, 0), size)"),
    "no clamp at the end": planted("min(max(at + k, 0), size - 1)", "max(at + k, 0)"),
    "all blur passes along rows": planted("pass < kBlurPasses ?", "pass < 2 * kBlurPasses ?"),
    "flip ignored": planted("shared.item->view.flip ? size - 1 - x : x", "x"),
    "footprints of columns and rows swapped": planted(
        "= column ? workspace.columns : workspace.rows",
        "= column ? workspace.rows : workspace.columns",
        evidence=PAST_GLOBAL,
    ),
    "window ignored": planted("footprint((column ? view.window_left : view.window_top) + to,", "footprint(to,"),
    "rows not rounded before the column": planted(
        "sum.r += weight * round_resampled(resized.r);",
        "sum.r += static_cast<int>((int64_t{weight} * resized.r) >> 22);",
    ),
    "sum of lumas goes on": Planted(
        "view.cu",
        "    uint32_t sum = 0;\n",
        "",
        more=(("  bool resized = false;\n", "  bool resized = false;\n  uint32_t sum = 0;\n"),),
    ),
    "only one warp's lumas": planted("__reduce_add_sync(kAllLanes, warp_sums[threadIdx.x % 32])", "warp_sums[0]"),
    "contrast of the view before": planted("    mean = mean_luma(block", "    if (!resized) mean = mean_luma(block"),
    "steps after a contrast dropped": planted("    if (last) break;", "    if (last || begin > 0) break;"),
    "every block makes every view": planted("i = static_cast<int>(blockIdx.x); i <", "i = 0; i <"),
    "workspace shared between blocks": planted(
        "workspace + blockIdx.x * plan.words", "workspace", variant="threads", evidence=RACE
    ),
    "too little room for footprints": planted("/ output)) + 2;", "/ output)) - 1;"),
    "workspace too small": planted("(size + 2 + plan.taps)", "(size - 2 + plan.taps)", evidence=PAST_GLOBAL),
    "table of values too small": planted(
        "values(arena.take<T>(kValues))", "values(arena.take<T>(kValues - 8))", evidence=PAST_SHARED
    ),
}
