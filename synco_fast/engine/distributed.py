"""The processes of a run, as torchrun started them."""

import os
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.constants import default_pg_timeout
from torch.distributed.rendezvous import rendezvous

from synco_fast.errors import UserError


@dataclass(frozen=True)
class Processes:
    """This process among all of them.

    Attributes:
        rank: global rank. world_size: number of processes. device: where this one computes.
        start: a name that these processes share with no earlier start of theirs.
    """

    rank: int
    world_size: int
    device: torch.device
    start: str = ""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()


def choose_device(wanted: str, option: str = "trainer.device =") -> torch.device:
    """`auto`, `cpu` or `cuda` to this process's device. `option` is what errors call it.

    Raises:
        UserError: cuda was asked for and there is none, or not one for each process.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(f"{option} cuda: PyTorch sees no CUDA device; `synco-fast doctor` says why")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"{option} {wanted}: local process {local_rank} has no GPU of its own, this machine has "
            f"{torch.cuda.device_count()}; start as many processes as GPUs"
        )
    return torch.device("cuda", local_rank)


def start(device: torch.device, minutes: float | None = None) -> Processes:
    """Join the process group that torchrun's environment describes; alone without one.

    Args:
        minutes: how long a collective may take; None: torch's default.

    Raises:
        UserError: the others were not there.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size == 1:
        return Processes(0, 1, device)
    timeout = default_pg_timeout if minutes is None else timedelta(minutes=minutes)
    try:
        store, rank, world_size = next(rendezvous("env://", timeout=timeout))
        # torchrun's store may outlive its processes, with the addresses of those that were there before a restart.
        name = name_of_start(store, rank, world_size, timeout)
        store = PrefixStore(f"start {name}", store)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(
            f"rank {os.environ.get('RANK')} of {world_size} cannot join the others at {place} (MASTER_ADDR, "
            f"MASTER_PORT): {_first_line(error)}"
        ) from error
    return Processes(dist.get_rank(), dist.get_world_size(), device, name)


def name_of_start(store: Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """The same for all that start together, and new. torchrun's count of restarts is each machine's own.

    Each asks whoever the store says is rank 0, until it is answered, which rank 0 of an earlier start no longer does.
    """
    mine = uuid.uuid4().hex
    if rank == 0:
        store.set("rank 0", mine)
        for other in range(1, world_size):
            asked = store.get(f"{mine} asked by {other}").decode()
            store.set(f"answer to {asked}", mine)
        return mine
    end = time.monotonic() + timeout.total_seconds()
    while not store.check([f"answer to {mine}"]):
        if time.monotonic() > end:
            raise RuntimeError(f"rank 0 has not answered within {timeout.total_seconds():g} s")
        store.set(f"{store.get('rank 0').decode()} asked by {rank}", mine)
        time.sleep(0.05)
    return store.get(f"answer to {mine}").decode()


def lost(error: RuntimeError) -> str | None:
    """In a line, how a collective failed; None: it is no error of one. gloo has no class for it."""
    failed = isinstance(error, dist.DistError) or "gloo" in str(error).lower()
    return _first_line(error) if failed else None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300]


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def reduce_sum(values: Tensor) -> Tensor:
    """The sum over processes."""
    return _reduced(values, dist.ReduceOp.SUM)


def reduce_mean(values: Tensor) -> Tensor:
    """The mean over processes."""
    return reduce_sum(values) / (dist.get_world_size() if dist.is_initialized() else 1)


def reduce_max(values: Tensor) -> Tensor:
    """The largest over processes."""
    return _reduced(values, dist.ReduceOp.MAX)


def gather_numbers(numbers: Sequence[int], device: torch.device) -> list[list[int]]:
    """Each process's whole numbers, by rank; all processes call it, with as many as they have."""
    if not dist.is_initialized():
        return [list(numbers)]
    counts = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(counts, torch.tensor([len(numbers)], device=device))
    padded = torch.zeros(int(counts.max()), dtype=torch.int64, device=device)
    padded[: len(numbers)] = torch.tensor(numbers, dtype=torch.int64, device=device)
    gathered = padded.new_empty(len(counts) * len(padded))
    dist.all_gather_into_tensor(gathered, padded)
    rows = gathered.view(len(counts), -1).tolist()
    return [row[:count] for row, count in zip(rows, counts.tolist(), strict=True)]


def _reduced(values: Tensor, operation: Any) -> Tensor:
    if not dist.is_initialized():
        return values
    values = values.clone()
    dist.all_reduce(values, operation)
    return values
