"""Which samples a key shares its batch norm statistics with: shuffling the keys' images, within or over processes."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from synco_fast.models.norm import key_permutation
from synco_fast.stages import stage

Encode = Callable[[Tensor], Tensor]


def all_gather_rows(rows: Tensor) -> Tensor:
    """(n, ...) of each process to (processes * n, ...) on all of them, in order of rank; itself on a single process."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    with stage("gather"):
        gathered = rows.new_empty((dist.get_world_size() * len(rows), *rows.shape[1:]))
        dist.all_gather_into_tensor(gathered, rows.contiguous())
    return gathered


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

    Every process gathers the whole batch and keeps its share of the permutation.
    """
    rank, samples = dist.get_rank(), len(images)
    mine = slice(rank * samples, (rank + 1) * samples)
    order = key_permutation(samples * dist.get_world_size(), seed, step, micro_batch)
    whole = all_gather_rows(images.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    keys = all_gather_rows(encode(_take(whole, order[mine])))
    return keys[torch.argsort(order)[mine]]


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
