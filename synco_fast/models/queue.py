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
        labelled: keep each row's class, too: `labels`, (K,) int64, -1 for the rows of the start. Else it is None.
    """

    rows: Tensor
    pointer: Tensor
    labels: Tensor | None

    def __init__(
        self, size: int, dim: int, dtype: torch.dtype, generator: torch.Generator, *, labelled: bool = False
    ) -> None:
        super().__init__()
        start = F.normalize(torch.randn(size, dim, generator=generator), dim=1)
        self.register_buffer("rows", start.to(dtype))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))
        # A buffer that is None is no part of the state.
        self.register_buffer("labels", torch.full((size,), -1) if labelled else None)

    @torch.no_grad()
    def enqueue(self, keys: Tensor, skip: Tensor, labels: Tensor | None = None) -> None:
        """Replace the oldest rows by keys (B, D), and their labels by labels (B,) int64, which a labelled queue needs.

        Where skip (scalar on the device) is not 0, leave all as it is.
        """
        before = self.pointer.clone()
        oldest = (before + torch.arange(len(keys), device=keys.device)) % len(self.rows)
        if self.labels is not None:
            assert labels is not None, "a labelled queue takes the keys' labels"
            self.labels.index_copy_(0, oldest, torch.where(skip > 0, self.labels[oldest], labels))
        enqueue(self.rows, self.pointer, torch.where(skip > 0, self.rows[oldest], keys.to(self.rows.dtype)))
        self.pointer.copy_(torch.where(skip > 0, before, self.pointer))
