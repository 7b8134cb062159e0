"""Batch norm that gives a key away: each query is paired with the key of another image of its own group.

Images are noise, of sizes so unequal that the largest of a group makes the group's statistics, and two views of two
images have nothing in common: a query can tell its key by shared statistics only. No weight moves, as what leaks needs
no learning; so keys of this step and of the queue's are alike in all else. Chance is what the same network makes of
keys of images of other groups.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from synco_fast.engine import speed
from synco_fast.engine.distributed import Processes
from synco_fast.engine.run import build_contrast
from synco_fast.engine.step import TrainStep
from synco_fast.ops import HardNegatives
from tests.engine.ranks import on_ranks
from tests.engine.steps import small_config

GROUP, GROUPS, SIZE, STEPS, FILL = 8, 8, 16, 20, 4
PARTNERS = {"of its group": 1, "of another group": 0}
"""Which dimension of (GROUPS, GROUP) images the keys are moved along."""


def accuracies(processes: Processes, mode: str, partner: str) -> Tensor:
    """Of the proxy task in each of STEPS steps: the share of queries that find their key above all of the queue."""
    batch, world = GROUP * GROUPS, processes.world_size
    config = small_config(
        "moco",
        data={"batch_size": batch, "image_size": SIZE, "eval_resize": SIZE},
        bn={"mode": mode, "group_size": GROUP},
        queue={"size": FILL * batch},
        # A micro-batch of a process is one group, but where groups are split off a batch.
        trainer={"accumulate": 1 if mode == "split" else GROUPS // world},
        model={"momentum": 1.0},
        loss={"temperature": 0.1},
    )
    how = speed.resolve(config, processes)
    step = TrainStep(config, processes, speed.apply(how, build_contrast(config, processes)), how)
    mine = slice(processes.rank * batch // world, (processes.rank + 1) * batch // world)
    generator, found = torch.Generator().manual_seed(1), []
    for number in range(FILL + STEPS):
        sizes = torch.exp(3 * torch.randn(GROUPS, GROUP, 1, 1, 1, generator=generator))
        images = sizes * torch.randn(GROUPS, GROUP, 3, SIZE, SIZE, generator=generator)
        keys = images.roll(1, dims=PARTNERS[partner])
        step([views.flatten(0, 1)[mine] for views in (images, keys)], HardNegatives.none(), number, 0.0)
        found.append(step.meter.read()["acc1"])
    return torch.tensor(found[FILL:], dtype=torch.float64)


def leaked(processes: Processes, *modes: str) -> list[Tensor]:
    return [accuracies(processes, mode, partner) for mode in modes for partner in PARTNERS]


def excess(own: Tensor, other: Tensor) -> float:
    """By how many standard errors the keys of its group are found more often than those of others."""
    error = ((own.var() + other.var()) / STEPS).sqrt()
    return float((own.mean() - other.mean()) / error)


def test_plain_and_split_on_one_process() -> None:
    plain, elsewhere, split, split_elsewhere = leaked(Processes(0, 1, torch.device("cpu")), "plain", "split")
    assert plain.mean() > 0.06 and excess(plain, elsewhere) > 8
    assert split.mean() < 0.02 and abs(excess(split, split_elsewhere)) < 4


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_plain_shuffle_and_sync_on_four_processes(tmp_path: Path) -> None:
    """`sync` leaks, too: its statistics are shared by more images, and by query and key all the same."""
    plain, elsewhere, shuffle, shuffle_elsewhere, sync, sync_elsewhere = on_ranks(leaked_on_four, 4, tmp_path)[0]
    assert plain.mean() > 0.06 and excess(plain, elsewhere) > 8
    assert shuffle.mean() < 0.02 and abs(excess(shuffle, shuffle_elsewhere)) < 4
    assert sync.mean() > 0.06 and excess(sync, sync_elsewhere) > 8


def leaked_on_four(processes: Processes) -> list[Tensor]:
    return leaked(processes, "plain", "shuffle", "sync")
