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
"""Of the fused backends: down to here exp(s / t) of unit rows is at most e^50, and its sums stay within float32.

So `cpu` subtracts no maximum. `cuda` scales each row by a power of two where t is below about 0.1, and `triton` follows
each row's maximum: a weight is an operand of their second product, and 16 bits have less range.
"""


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
