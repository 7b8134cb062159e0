"""Order of samples: permutations, distinct samples per epoch, shards, places."""

import pytest
import torch

from synco_fast.data.order import (
    Position,
    batch_positions,
    batch_samples,
    data_key,
    epoch_order,
    steps_per_epoch,
)
from synco_fast.errors import UserError


def test_epoch_order_is_a_permutation_fixed_by_its_arguments() -> None:
    order = epoch_order(1000, seed=5, epoch=3)
    assert order.dtype == torch.int64
    assert torch.equal(order.sort().values, torch.arange(1000))
    epoch_order(1000, seed=5, epoch=3).zero_()  # the caller's copy is its own
    assert torch.equal(order, epoch_order(1000, seed=5, epoch=3))
    for other in (epoch_order(1000, 5, 4), epoch_order(1000, 6, 3), epoch_order(1000, 5 + 2**40, 3)):
        # Two random permutations agree at one place on average.
        assert (order == other).sum() < 10


def test_epoch_order_is_uniform() -> None:
    firsts = torch.stack([epoch_order(8, seed, epoch=0) for seed in range(4000)])
    for column in firsts.T:
        counts = torch.bincount(column, minlength=8).double()
        chi_square = ((counts - 500) ** 2 / 500).sum()
        assert chi_square < 29  # 7 degrees of freedom, p = 1.5e-4


def test_known_values() -> None:
    """Checkpoints name places in this order, so it must never change."""
    assert epoch_order(10, seed=1, epoch=2).tolist() == [9, 0, 3, 7, 6, 8, 2, 1, 5, 4]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("n", [60, 61, 66, 12])
def test_an_epoch_has_distinct_samples(n: int, world_size: int) -> None:
    batch_size = 12
    steps = steps_per_epoch(n, batch_size)
    seen = [
        batch_samples(n, batch_size, seed=1, epoch=7, step=step, rank=rank, world_size=world_size)
        for step in range(steps)
        for rank in range(world_size)
    ]
    assert all(len(part) == batch_size // world_size for part in seen)
    samples = torch.cat(seen)
    assert len(samples) == n // batch_size * batch_size == len(samples.unique())
    assert torch.equal(samples, epoch_order(n, 1, 7)[: len(samples)])


def test_rows_of_ranks_are_contiguous() -> None:
    assert batch_positions(12, step=3, rank=1, world_size=2).tolist() == list(range(42, 48))


def test_places() -> None:
    assert Position.at(0, 5) == Position(0, 0)
    assert Position.at(13, 5) == Position(2, 3)
    assert Position(2, 3).global_step(5) == 13


def test_refusals() -> None:
    with pytest.raises(UserError, match="7 images, fewer than one batch of 8"):
        steps_per_epoch(7, 8)
    with pytest.raises(UserError, match="multiple of 3"):
        batch_samples(100, 8, 0, 0, 0, rank=0, world_size=3)
    for step in (-1, 12):
        with pytest.raises(ValueError, match="not within an epoch of 12 steps"):
            batch_samples(100, 8, 0, 0, step)


def test_data_key_differs_from_the_ops_key() -> None:
    for seed in (0, 1, 2**63, -1):
        assert 0 <= data_key(seed) < 2**64
        assert data_key(seed) != seed % 2**64
        assert data_key(seed) & 0xFFFFFFFF == seed & 0xFFFFFFFF
