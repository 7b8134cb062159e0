"""Order of samples: permutations, distinct samples per epoch, shards, places."""

import pytest
import torch

from synco_fast.data.order import (
    batch_positions,
    batch_samples,
    data_key,
    epoch_order,
    rank_order,
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


def rows_of(n: int, epoch: int, world_size: int, skipped: list[tuple[int, ...]] | None = None) -> list[list[int]]:
    """Samples of each rank's rows in an epoch of batches of 12, and after those its spare ones."""
    lists = skipped or [()] * world_size
    return [rank_order(n, 12, 1, epoch, rank, world_size, lists[rank]).tolist() for rank in range(world_size)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("n", [60, 61, 66, 12])
def test_an_epoch_has_distinct_samples(n: int, world_size: int) -> None:
    steps, local = steps_per_epoch(n, 12), 12 // world_size
    ranks = rows_of(n, 7, world_size)
    assert sorted(sample for rank in ranks for sample in rank) == list(range(n))
    for step in range(steps):
        batch = [sample for rank in ranks for sample in rank[step * local : (step + 1) * local]]
        assert batch == batch_samples(n, 12, seed=1, epoch=7, step=step).tolist()
        assert batch == epoch_order(n, 1, 7)[12 * step : 12 * step + 12].tolist()


def test_the_last_sample_takes_the_slot_of_one_that_is_skipped() -> None:
    order = epoch_order(66, 1, 7).tolist()
    [found] = rows_of(66, 7, 1, [(order[30],)])
    assert found == [*order[:30], order[65], *order[31:65]]
    [found] = rows_of(66, 7, 1, [(order[65],)])
    assert found == order[:65]
    # The replacement of the first is bad, too; the last of the rest takes the slot in its turn.
    [found] = rows_of(66, 7, 1, [(order[30], order[65])])
    assert found == [*order[:30], order[64], *order[31:64]]
    # The other way round, the first is gone before it could replace anything.
    [other] = rows_of(66, 7, 1, [(order[65], order[30])])
    assert other == found
    assert rows_of(66, 7, 1) == [order]  # what is cached was not touched


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_skipped_samples_are_gone_and_no_other_comes_twice(world_size: int) -> None:
    """Random lists: every rank's samples stay its own, and adding to a list leaves the rows before it alone."""
    for trial in range(100):
        ranks = rows_of(65, 2, world_size)
        shuffled = torch.randperm(65, generator=torch.Generator().manual_seed(trial)).tolist()
        skipped = [tuple(shuffled[:6])] * world_size
        after = rows_of(65, 2, world_size, skipped)
        for rank, before, lists in zip(after, ranks, skipped, strict=True):
            assert sorted(rank) == sorted(set(before) - set(lists))
            known = lists[:-1]
            partly = rank_order(65, 12, 1, 2, ranks.index(before), world_size, known).tolist()
            if lists[-1] in partly:
                slot = partly.index(lists[-1])
                assert rank[:slot] == partly[:slot] and rank[slot + 1 :] == partly[slot + 1 : -1]
            else:
                assert rank == partly


def test_ranks_fill_gaps_from_shares_of_the_unused() -> None:
    order = epoch_order(66, 1, 7).tolist()
    first, second = rows_of(66, 7, 2, [(order[0], order[12]), (order[6], order[0])])
    assert [first[0], first[6], second[0]] == [order[65], order[63], order[64]]
    assert first[1:6] == order[1:6] and second[1:6] == order[7:12]


def test_rows_of_ranks_are_contiguous() -> None:
    assert batch_positions(12, step=3, rank=1, world_size=2).tolist() == list(range(42, 48))


def test_refusals() -> None:
    with pytest.raises(UserError, match="7 images, fewer than one batch of 8"):
        steps_per_epoch(7, 8)
    with pytest.raises(UserError, match="multiple of 3"):
        batch_positions(8, 0, rank=0, world_size=3)
    for step in (-1, 12):
        with pytest.raises(ValueError, match="not within an epoch of 12 steps"):
            batch_samples(100, 8, 0, 0, step)


def test_data_key_differs_from_the_ops_key() -> None:
    for seed in (0, 1, 2**63, -1):
        assert 0 <= data_key(seed) < 2**64
        assert data_key(seed) != seed % 2**64
        assert data_key(seed) & 0xFFFFFFFF == seed & 0xFFFFFFFF
