"""A non-finite loss or gradient, noticed on the device at once and by the host when it next looks."""

import torch
from torch import Tensor

from synco_fast.engine.distributed import reduce_max


class NonFiniteGuard:
    """Latches the first bad step and masks updates from then on; nothing is read back before `first_bad_step`.

    Args:
        metrics: number of a step's metrics.
        device: of the run. What is kept there stays where it is, as a CUDA graph needs it.

    Attributes:
        skip: float32 scalar on the device, 1 from the bad step on: query weights, optimizer and queue stay as they
            were before it. (The key encoder goes on following weights that no longer move.)
        values: the metrics of the bad step, or else of the last one.
    """

    def __init__(self, metrics: int, device: torch.device) -> None:
        self._first = torch.full((), -1, dtype=torch.int64, device=device)
        self.skip = torch.zeros((), device=device)
        self.values = torch.zeros(metrics, device=device)

    def watch(self, loss: Tensor, gradient_norm: Tensor, step: Tensor, values: Tensor) -> None:
        """Look at one step. The verdict is that of all processes together."""
        bad = reduce_max((~(loss.isfinite() & gradient_norm.isfinite())).float())
        self.values.copy_(torch.where(self._first < 0, values, self.values))
        self._first.copy_(torch.where((self._first < 0) & (bad > 0), step, self._first))
        self.skip.copy_(self._first >= 0)

    def first_bad_step(self) -> int | None:
        """The first bad step, or None. Waits for the device."""
        first = int(self._first)
        return None if first < 0 else first
