"""Which samples a key shares its batch norm statistics with: shuffling the keys' images, within or over processes."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from synco_fast.models.norm import key_permutation
from synco_fast.stages import stage

Encode = Callable[[Tensor], Tensor]


class Gathering:
    """Rows (n, ...) of each process on their way to all of them, beside other work, until `rows` is called."""

    def __init__(self, rows: Tensor) -> None:
        self._gathered, self._work = rows, None
        if dist.is_initialized() and dist.get_world_size() > 1:
            with stage("gather"):
                self._gathered = rows.new_empty((dist.get_world_size() * len(rows), *rows.shape[1:]))
                self._work = dist.all_gather_into_tensor(self._gathered, rows.contiguous(), async_op=True)

    def rows(self) -> Tensor:
        """(processes * n, ...) in order of rank."""
        if self._work is not None:
            with stage("gather"):
                self._work.wait()
        return self._gathered


def all_gather_rows(rows: Tensor) -> Tensor:
    """(n, ...) of each process to (processes * n, ...) on all of them, in order of rank; itself on a single process."""
    return Gathering(rows).rows()


def broadcast_buffers(module: nn.Module) -> None:
    """Give every process the first one's buffers."""
    if dist.is_initialized():
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def encode_in_order(encode: Encode, images: Tensor, seed: int, step: Tensor, micro_batch: int) -> Tensor:
    """Keys (B, D) of images (B, 3, H, W), no shuffling."""
    return encode(images)


def encode_shuffled(encode: Encode, images: Tensor, seed: int, step: Tensor, micro_batch: int) -> Tensor:
    """Keys of images shuffled within this process (mode split), back in their order."""
    order = key_permutation(len(images), seed, step, micro_batch)
    return encode(_take(images, order))[torch.argsort(order)]


def encode_shuffled_over_processes(encode: Encode, images: Tensor, seed: int, step: Tensor, micro_batch: int) -> Tensor:
    """Keys of images shuffled over all processes (MoCo, section 3.3), back in their order and place.

    Every process deals its images, in an order of its own, out to all processes in equal shares. So a key's batch is
    made of all processes' images alike, only what changes place is sent, and no process has to wait for its device to
    know how much. (Of a permutation of the whole batch the shares would be drawn, too.)
    """
    device = images.device.type
    if torch.is_autocast_enabled(device):  # as the first convolution would, but before they are sent
        images = images.to(torch.get_autocast_dtype(device))
    samples, processes, rank = len(images), dist.get_world_size(), dist.get_rank()
    given = [share(samples, processes, rank, other) for other in range(processes)]
    taken = [share(samples, processes, other, rank) for other in range(processes)]
    order = key_permutation(samples, seed, step, micro_batch, first=rank * samples)
    dealt = _take(images, order).permute(0, 2, 3, 1)  # rows of pixels, as channels-last images lie in memory
    batch = _exchange(dealt, given, taken).permute(0, 3, 1, 2)
    if not images.is_contiguous(memory_format=torch.channels_last):
        batch = batch.contiguous()
    return _exchange(encode(batch), taken, given)[torch.argsort(order)]


def share(samples: int, processes: int, giver: int, taker: int) -> int:
    """How many of its samples one process gives to another; each gives and takes as many as it has.

    Of a rest that does not divide, it keeps one, so that it sends (processes - 1) / processes of its samples at most.
    """
    equal, rest = divmod(samples, processes)
    return equal + ((taker - giver) % processes < rest)


def _exchange(rows: Tensor, given: list[int], taken: list[int]) -> Tensor:
    """Send the first given[0] rows (n, ...) to process 0, the next to 1 and so on; the rows that came, by process."""
    with stage("gather"):
        came = rows.new_empty((sum(taken), *rows.shape[1:]))
        dist.all_to_all_single(came, rows.contiguous(), taken, given)
    return came


def _take(images: Tensor, order: Tensor) -> Tensor:
    last = images.is_contiguous(memory_format=torch.channels_last)
    return images[order].contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


KEY_SHUFFLES = {
    "plain": encode_in_order,
    "sync": encode_in_order,
    "split": encode_shuffled,
    "shuffle": encode_shuffled_over_processes,
}
"""By batch norm mode."""
