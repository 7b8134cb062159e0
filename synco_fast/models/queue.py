"""The dictionary of past keys."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from synco_fast.ops import enqueue


class KeyQueue(nn.Module):
    """K unit rows of dimension D and the place of the oldest; both live on the device.

    Args:
        size: K.
        dim: D.
        dtype: of the rows. Unit rows lie in [-1, 1], where float16 keeps 8 times the precision of bfloat16.
        generator: of the random unit rows at the start.
    """

    rows: Tensor
    pointer: Tensor

    def __init__(self, size: int, dim: int, dtype: torch.dtype, generator: torch.Generator) -> None:
        super().__init__()
        start = F.normalize(torch.randn(size, dim, generator=generator), dim=1)
        self.register_buffer("rows", start.to(dtype))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def enqueue(self, keys: Tensor, skip: Tensor) -> None:
        """Replace the oldest rows by keys (B, D); where skip (scalar on the device) is not 0, leave all as it is."""
        before = self.pointer.clone()
        oldest = (before + torch.arange(len(keys), device=keys.device)) % len(self.rows)
        enqueue(self.rows, self.pointer, torch.where(skip > 0, self.rows[oldest], keys.to(self.rows.dtype)))
        self.pointer.copy_(torch.where(skip > 0, before, self.pointer))
