"""Run by torchrun in test_distributed.py: what `shuffle` encodes on each rank, and what comes back."""

import sys

import torch

from synco_fast.engine import distributed
from synco_fast.models.shuffle import encode_shuffled_over_processes


def main(folder: str) -> None:
    processes = distributed.start(torch.device("cpu"))
    saved = []
    for micro_batch in range(3):
        images = torch.randn(8, 3, 2, 2, generator=torch.Generator().manual_seed(10 * processes.rank + micro_batch))
        seen = []

        def encode(batch: torch.Tensor, seen: list[torch.Tensor] = seen) -> torch.Tensor:
            seen.append(batch)
            return batch.flatten(1)

        keys = encode_shuffled_over_processes(encode, images, 3, torch.tensor(5), micro_batch)
        saved.append((images, keys, seen[0].contiguous()))
    torch.save(saved, f"{folder}/rank-{processes.rank}.pt")
    processes.barrier()
    distributed.stop()


if __name__ == "__main__":
    main(sys.argv[1])
