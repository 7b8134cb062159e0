"""Which samples make up a batch: a pure function of (seed, epoch, step, skipped), for any number of ranks.

There is no shuffling state. An epoch's order sorts Philox keys, so a resume, a rebuild or another world size
is a seek to (epoch, step). The samples found bad so far, in the order they were found, give their slots to what the
epoch would leave unused.
"""

from functools import lru_cache

import torch
from torch import Tensor

from synco_fast.errors import UserError
from synco_fast.ops.philox import philox

# Counter word 2 keeps the streams apart: the order here, view parameters in views.py.
ORDER_STREAM = 0
VIEW_STREAM = 1


def data_key(seed: int) -> int:
    """The 64-bit Philox key of the data side, unlike the op's key, which is the seed itself."""
    return (seed ^ (0x64617461 << 32)) & 0xFFFFFFFFFFFFFFFF


def steps_per_epoch(n: int, batch_size: int) -> int:
    """floor(n / batch_size).

    Raises:
        UserError: fewer samples than one batch.
    """
    if n < batch_size:
        raise UserError(
            f"the data set has {n} images, fewer than one batch of {batch_size}; lower data.batch_size "
            f"to at most {n} or add images"
        )
    return n // batch_size


def epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch's samples: (n,) int64, a permutation of 0..n-1."""
    return _epoch_order(n, seed, epoch).clone()


# Two entries, because reading ahead crosses into the next epoch while the current one is still asked about.
@lru_cache(maxsize=2)
def _epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    high, low, _, _ = philox(data_key(seed), torch.arange(n), 0, ORDER_STREAM, epoch)
    return torch.argsort((high >> 1) << 32 | low, stable=True)


# Three entries: of the batch handed out, of those read ahead, and the one made in advance.
@lru_cache(maxsize=3)
def rank_order(
    n: int, batch_size: int, seed: int, epoch: int, rank: int, world_size: int, skipped: tuple[int, ...] = ()
) -> Tensor:
    """What one rank goes through in an epoch: the samples of its rows, step by step, then its spare ones.

    The floor(n / batch_size) * batch_size first samples of the epoch's order are in rows; of the rest, from the end,
    every world_size-th is a rank's own. Each skipped sample, in turn, gives its slot to what is then the last one, and
    the order gets shorter by one: on one rank, a step of the epoch is lost when the spare ones are used up; on several,
    this is where a rank has fewer than its share of the steps.

    Args:
        n: samples in the data set.
        batch_size: rows of the global batch, a multiple of world_size.
        seed, epoch: of the order.
        rank, world_size: step s of rank r has elements [s * local, (s + 1) * local), local = batch_size // world_size.
        skipped: samples this rank has found bad, in the order found.

    Returns:
        (m,) int64 indices of samples; not to be written to.
    """
    order = _epoch_order(n, seed, epoch)
    rows = steps_per_epoch(n, batch_size) * batch_size
    own = order[:rows].view(-1, world_size, batch_size // world_size)[:, rank].flatten()
    spare = order[rows:].flip(0)[rank::world_size].flip(0)
    return _without(torch.cat([own, spare]), n, skipped)


def _without(order: Tensor, n: int, skipped: tuple[int, ...]) -> Tensor:
    unwanted = torch.zeros(n, dtype=torch.bool)
    unwanted[list(skipped)] = True
    slots = {int(order[slot]): slot for slot in unwanted[order].nonzero().flatten().tolist()}
    end = len(order)
    for sample in skipped:
        if sample not in slots:  # in another rank's share of this epoch
            continue
        slot = slots.pop(sample)
        end -= 1
        last = int(order[end])
        order[slot] = last
        if last in slots:
            slots[last] = slot
    return order[:end]


def batch_samples(n: int, batch_size: int, seed: int, epoch: int, step: int) -> Tensor:
    """Samples of a global batch, none of them skipped: (batch_size,) int64, for 0 <= step < steps_per_epoch."""
    if not 0 <= step < steps_per_epoch(n, batch_size):
        raise ValueError(f"step {step} is not within an epoch of {steps_per_epoch(n, batch_size)} steps")
    return _epoch_order(n, seed, epoch)[batch_positions(batch_size, step)]


def batch_positions(batch_size: int, step: int, rank: int = 0, world_size: int = 1) -> Tensor:
    """Positions of one rank's rows in the epoch's global order, (local,) int64."""
    if batch_size % world_size:
        raise UserError(
            f"batch size {batch_size} cannot be shared equally by {world_size} processes; "
            f"make data.batch_size a multiple of {world_size}"
        )
    local = batch_size // world_size
    return torch.arange(local) + (step * batch_size + rank * local)
