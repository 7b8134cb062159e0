"""Batch norm over several processes: who normalises with whom, what is sent for it, and that all comes back."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from synco_fast.engine.distributed import Processes
from synco_fast.models.norm import SyncBatchNorm2d
from synco_fast.models.shuffle import encode_shuffled_over_processes
from tests.engine.ranks import on_ranks

SAMPLES = 10  # of a process, which 3 processes cannot deal out evenly


def images(rank: int, micro_batch: int) -> Tensor:
    return torch.randn(SAMPLES, 3, 2, 2, generator=torch.Generator().manual_seed(10 * rank + micro_batch))


def shuffled(processes: Processes) -> list[dict[str, Any]]:
    """What is encoded on this rank, and what comes back: three micro-batches, the last of them channels last."""
    found = []
    for micro_batch in range(3):
        given, seen = images(processes.rank, micro_batch), []
        if micro_batch == 2:
            given = given.contiguous(memory_format=torch.channels_last)

        def encode(batch: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(batch)
            return batch.flatten(1)

        keys = encode_shuffled_over_processes(encode, given, 3, torch.tensor(5), micro_batch)
        last = seen[0].is_contiguous(memory_format=torch.channels_last)
        found.append({"keys": keys, "seen": seen[0].contiguous(), "last": last})
    return found


def test_images_are_dealt_out_evenly_and_keys_come_back(tmp_path: Path) -> None:
    """3 processes of 10 images each: every one encodes 10, of which each process gave 3 or 4, in a random choice."""
    ranks = on_ranks(shuffled, 3, tmp_path)
    for micro_batch in range(3):
        given = [images(rank, micro_batch) for rank in range(3)]
        home = {tuple(row.tolist()): rank for rank in range(3) for row in given[rank].flatten(1)}
        taken: list[tuple[float, ...]] = []
        for rank, parts in enumerate(ranks):
            found = parts[micro_batch]
            assert torch.equal(found["keys"], given[rank].flatten(1)) and found["last"] == (micro_batch == 2)
            rows = [tuple(row.tolist()) for row in found["seen"].flatten(1)]
            givers = [home[row] for row in rows]
            assert len(rows) == SAMPLES and givers.count(rank) == 4, "what does not divide stays"
            assert {givers.count(giver) for giver in range(3)} == {3, 4}
            taken += rows
        assert sorted(taken) == sorted(home)
    # Which ones is drawn anew, for each micro-batch and each process.
    order = [
        [int((part["seen"] == image).flatten(1).all(dim=1).any()) for image in images(rank, i)]
        for rank, parts in enumerate(ranks)
        for i, part in enumerate(parts)
    ]
    assert len({tuple(kept) for kept in order}) > 6


def synchronised(processes: Processes) -> dict[str, Tensor]:
    """Outputs, gradients and running statistics of this process's half, and of a second pass in evaluation."""
    layer = SyncBatchNorm2d(3)
    nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(1))
    given = (images(processes.rank, 0) * 3 + 5).requires_grad_()
    out = layer(given)
    (out * images(processes.rank, 1)).sum().backward()
    assert given.grad is not None and layer.weight.grad is not None
    found = {"out": out, "images": given.grad, "weight": layer.weight.grad}
    found |= {"mean": layer.running_mean, "var": layer.running_var, "eval": layer.eval()(given)}
    return {name: value.detach() for name, value in found.items()}


def test_sync_is_batch_norm_over_everything(tmp_path: Path) -> None:
    """Against one BatchNorm2d in float64 on the samples of both processes."""
    ranks = on_ranks(synchronised, 2, tmp_path)
    layer = nn.BatchNorm2d(3)
    nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(1))
    layer.double()
    given = torch.cat([images(rank, 0) * 3 + 5 for rank in range(2)]).double().requires_grad_()
    out = layer(given)
    (out * torch.cat([images(rank, 1) for rank in range(2)])).sum().backward()
    assert given.grad is not None and layer.weight.grad is not None
    whole = {name: torch.cat([rank[name] for rank in ranks]) for name in ("out", "images", "eval")}
    expected = {"out": out, "images": given.grad, "eval": layer.eval()(given)}
    for name, value in expected.items():
        torch.testing.assert_close(whole[name].double(), value.detach(), rtol=1e-5, atol=1e-5)
    # A parameter's gradient is each process's own share, which DDP adds up.
    torch.testing.assert_close(sum(rank["weight"] for rank in ranks).double(), layer.weight.grad, rtol=1e-5, atol=1e-5)
    for rank in ranks:
        torch.testing.assert_close(rank["mean"].double(), layer.running_mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(rank["var"].double(), layer.running_var, rtol=1e-6, atol=1e-6)
