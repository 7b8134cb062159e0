"""The augmentation's CUDA kernel in the emulator against plain torch, bit for bit, and mistakes planted into it."""

import itertools

import pytest
import torch

from synco_fast.data.numbers import COLOUR_STEPS, NOTHING
from tests.simt.build import build, edited, why_not
from tests.simt.planted_infonce import WRONG, Planted
from tests.simt.planted_view import PLANTED
from tests.simt.view import (
    CONTRAST,
    FLAGS,
    KERNEL,
    MAIN,
    Views,
    call,
    program,
    random_views,
    training_views,
    wrong_views,
)

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

CONTRASTS = [CONTRAST, NOTHING, CONTRAST, CONTRAST, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("size", "n"), [(16, 100), (17, 100), (33, 60), (64, 20)])
def test_random_views(size: int, n: int, dtype: torch.dtype) -> None:
    views = random_views(n, size, seed=size)
    assert set(views.numbers[:, 9].tolist()) == {-1, 0, 1, 2}, "with these radii, or without a blur"
    assert wrong_views(program(), views, dtype, processors=size % 10) == []


def test_colours_in_every_order() -> None:
    orders = list(itertools.permutations(range(COLOUR_STEPS)))
    assert wrong_views(program(), random_views(len(orders), 16, seed=1, steps=orders)) == []


def test_training_views() -> None:
    """Of the default size."""
    assert wrong_views(program(), training_views(4, 224)) == []


@pytest.mark.parametrize("schedule", ["fwd", "rev", "rand:1", "greedy:1"])
def test_any_grid_and_schedule(schedule: str) -> None:
    views = random_views(9, 20, seed=3)
    for processors in (1, 2, 9, 30):
        assert wrong_views(program(), views, processors=processors, schedule=schedule) == []


def few_views() -> Views:
    """Two to a block, with a blur, several contrasts or neither; rows and columns alike in none."""
    return random_views(6, 20, seed=5, steps=[CONTRASTS, [0, 1, 2, 3, NOTHING], CONTRASTS, [4, 1, 3, 2, 0]] * 2)


@pytest.mark.parametrize("variant", ["sanitized", "threads"])
def test_nothing_to_report(variant: str) -> None:
    assert wrong_views(program(variant), few_views(), processors=2) == []


def test_the_views_that_catch_mistakes_pass_without() -> None:
    for schedule in ("fwd", "rev"):
        assert wrong_views(program(), few_views(), processors=2, schedule=schedule) == []


@pytest.mark.parametrize("planted", PLANTED.values(), ids=PLANTED.keys())
def test_a_mistake_is_caught(planted: Planted) -> None:
    name = next(name for name, other in PLANTED.items() if other is planted)
    edits = {planted.file: [(planted.old, planted.new), *planted.more]}
    folder = edited(f"view-{'-'.join(name.split())}", [KERNEL], edits)
    built = build([folder / KERNEL.name, MAIN], planted.variant, flags=(*FLAGS, "-O0", "-Wno-unused"))
    if planted.evidence == WRONG:
        assert wrong_views(built, few_views(), processors=2, schedule=planted.schedule)
    else:
        done, _ = call(built, few_views(), torch.float32, processors=2, schedule=planted.schedule)
        assert done.returncode != 0
        assert planted.evidence in done.stderr
