"""The precision contract (docs/design.md, The op), in one place for all backends in PyTorch."""

import torch
from torch import Tensor

MIN_NORM = 1e-2
"""A synthetic vector shorter than this is divided by it and not by its own length.

It concerns vectors that all but cancel (a query mixed half and half with its own opposite), which no hard set holds.
There the closed forms' length is a difference of near-equal numbers, and dividing by it would amplify their rounding
without bound.
"""

MIN_TEMPERATURE = 0.02
"""The fused backends take exp(s / t) as it is, with no maximum subtracted: down to here it stays within float32."""


def compute_dtype(queue: Tensor) -> torch.dtype:
    """Accumulate in float32, or in float64 for a float64 queue."""
    return torch.promote_types(queue.dtype, torch.float32)


def round_to(q: Tensor, queue: Tensor) -> Tensor:
    """Round q once to the queue's dtype, then go on in the compute dtype. Gradients pass straight through."""
    rounded = q.detach().to(queue.dtype).to(compute_dtype(queue))
    if not q.requires_grad:
        return rounded
    wide = q.to(rounded.dtype)
    return wide + (rounded - wide.detach())
