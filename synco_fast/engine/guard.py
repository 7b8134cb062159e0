"""A non-finite loss or gradient, noticed on the device at once and by the host when it next looks."""

from typing import Any

import torch
from torch import Tensor

from synco_fast.engine.distributed import reduce_max, reduce_mean


class NonFiniteGuard:
    """Masks the update of each bad step, and from one too many on of all; nothing is read back before `found`.

    Args:
        metrics: number of a step's metrics. limit: of bad steps that training goes on after.
        device: of the run. What is kept there stays where it is, as a CUDA graph needs it.

    Attributes:
        skip: float32 scalar on the device, 1 where this step's update is left out: query weights, optimizer and queue
            stay as they were before it. (The key encoder goes on following weights that do not move.)
        loss: of the last step, whatever it was.
    """

    def __init__(self, metrics: int, limit: int, device: torch.device) -> None:
        self.limit = limit
        self.skip, self.loss = torch.zeros((), device=device), torch.zeros((), device=device)
        self._count = torch.zeros((), dtype=torch.int64, device=device)
        self._steps = torch.full((limit + 1,), -1, dtype=torch.int64, device=device)
        self._values = torch.zeros(limit + 1, metrics, device=device)
        self._places = torch.arange(limit + 1, device=device)
        self._told = 0

    def watch(self, loss: Tensor, gradient_norm: Tensor, step: Tensor, values: Tensor) -> None:
        """Look at one step. The verdict is that of all processes together."""
        self.loss.copy_(loss)
        bad = reduce_max((~(loss.isfinite() & gradient_norm.isfinite())).float()) > 0
        here = bad & (self._places == self._count)
        self._steps.copy_(torch.where(here, step, self._steps))
        self._values.copy_(torch.where(here[:, None], values, self._values))
        self._count += bad
        self.skip.copy_(bad | (self._count > self.limit))

    @property
    def exhausted(self) -> bool:
        """Whether there were more bad steps than the limit. Waits for the device."""
        return int(self._count) > self.limit

    def found(self) -> list[tuple[int, list[float]]]:
        """Bad steps since the last call, with their metrics. Waits for the device; all processes call it."""
        count = min(int(self._count), self.limit + 1)
        new = range(self._told, count)
        self._told = count
        if not new:
            return []
        steps, values = self._steps.tolist(), reduce_mean(self._values).tolist()
        return [(steps[i], values[i]) for i in new]

    def state_dict(self) -> dict[str, Any]:
        return {"count": int(self._count)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting: what was found then has been told. If the limit is lower now, the next one is too many."""
        self._told = min(int(state["count"]), self.limit)
        self._count.fill_(self._told)
