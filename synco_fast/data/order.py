"""Which samples make up a batch: a pure function of (seed, epoch, step), for any number of ranks.

There is no shuffling state. An epoch's order sorts Philox keys, so a resume, a rebuild or another world size
is a seek to (epoch, step).
"""

from dataclasses import dataclass
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


@dataclass(frozen=True)
class Position:
    """A place in training: `step` batches into `epoch`."""

    epoch: int
    step: int

    @staticmethod
    def at(global_step: int, steps_per_epoch: int) -> "Position":
        """The place after `global_step` batches."""
        return Position(*divmod(global_step, steps_per_epoch))

    def global_step(self, steps_per_epoch: int) -> int:
        """How many batches come before this place."""
        return self.epoch * steps_per_epoch + self.step


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


def batch_samples(
    n: int, batch_size: int, seed: int, epoch: int, step: int, rank: int = 0, world_size: int = 1
) -> Tensor:
    """Samples of one rank's rows of a global batch.

    Args:
        n: samples in the data set.
        batch_size: rows of the global batch, a multiple of world_size.
        seed, epoch, step: the place; 0 <= step < steps_per_epoch(n, batch_size).
        rank, world_size: rank r has rows [r * local, (r + 1) * local), local = batch_size // world_size.

    Returns:
        (local,) int64 indices of samples.
    """
    if not 0 <= step < steps_per_epoch(n, batch_size):
        raise ValueError(f"step {step} is not within an epoch of {steps_per_epoch(n, batch_size)} steps")
    return _epoch_order(n, seed, epoch)[batch_positions(batch_size, step, rank, world_size)]


def batch_positions(batch_size: int, step: int, rank: int = 0, world_size: int = 1) -> Tensor:
    """Positions of one rank's rows in the epoch's global order, (local,) int64."""
    if batch_size % world_size:
        raise UserError(
            f"batch size {batch_size} cannot be shared equally by {world_size} processes; "
            f"make data.batch_size a multiple of {world_size}"
        )
    local = batch_size // world_size
    return torch.arange(local) + (step * batch_size + rank * local)
