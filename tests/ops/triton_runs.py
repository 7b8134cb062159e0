"""Runs the `triton` backend: in Triton's interpreter where TRITON_INTERPRET=1, else on a CUDA device."""

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from synco_fast.ops import HardNegatives, eager, stat_names, triton_infonce
from tests.ops.cases import rounding_floor

INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETER else "cuda"
APART = not INTERPRETER and not torch.cuda.is_available()
"""The tests cannot run in this process."""

here = pytest.mark.skipif(APART, reason="test_in_the_interpreter of test_triton.py runs them")

Result = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def run(
    backend: Any, q: Tensor, k: Tensor, queue: Tensor, *, hard: HardNegatives, temperature: float = 0.2, **place: Any
) -> Result:
    """A backend's own function, on tensors as they are. `place`: seed, step, row_offset."""
    place = {"seed": 0, "step": 0, "row_offset": 0, **place}
    place["step"] = torch.tensor(place["step"], device=q.device)
    if backend is eager:
        place["same_class"] = None
    return backend.infonce(q, k, queue, hard, temperature, **place)


def check(
    q: Tensor, k: Tensor, queue: Tensor, hard: HardNegatives, temperature: float = 0.2, *, ties: int = 0, **place: Any
) -> Result:
    """As exact as eager in the same precision, up to the rounding floor; the result, on the CPU.

    ties: how many synthetic negatives may tie with the positive to the last bit, and fall on either side.
    """
    q, k, queue = q.to(DEVICE), k.to(DEVICE), queue.to(DEVICE)
    operands = q.to(queue.dtype).double(), k.double(), queue.double()
    (truth, true_grad, *_), (loss, grad, rank, rank_all, stats), (same, same_grad, same_rank, same_all, same_stats) = (
        run(backend, *tensors, hard=hard, temperature=temperature, **place)
        for backend, tensors in ((eager, operands), (triton_infonce, (q, k, queue)), (eager, (q, k, queue)))
    )
    assert loss.dtype == grad.dtype == stats.dtype == torch.float32 and rank.dtype == rank_all.dtype == torch.int64
    assert loss.shape == () and grad.shape == q.shape and stats.shape == (len(stat_names(hard)),)
    floors = rounding_floor(temperature, len(q), truth.item())
    assert (loss - truth).abs() <= 2 * (same - truth).abs() + floors[0]
    assert (grad - true_grad).norm() <= 2 * (same_grad - true_grad).norm() + floors[1]
    assert torch.equal(rank, same_rank) and (rank_all - same_all).abs().max() <= ties
    torch.testing.assert_close(stats, same_stats, rtol=0, atol=max(1e-6, rounding_floor(temperature, len(q))[0]))
    return loss.cpu(), grad.cpu(), rank.cpu(), rank_all.cpu(), stats.cpu()
