"""SGD and LARS, both able to leave out a step on the device's word alone."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from synco_fast.config import Optim


class Lars(torch.optim.SGD):
    """Layer-wise adaptive rates (You et al., arXiv 1708.03888): SGD on gradients scaled layer by layer.

    The gradient of a weight w, weight decay included, is scaled by trust |w| / |gradient|. Vectors (biases, batch
    norm) are neither scaled nor decayed. What remains is plain fused SGD with momentum.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, momentum: float, weight_decay: float, trust: float
    ) -> None:
        super().__init__(params, lr=lr, momentum=momentum, fused=True)
        self.decay = weight_decay
        self.trust = trust

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        weights = [p for group in self.param_groups for p in group["params"] if p.grad is not None and p.dim() > 1]
        gradients = [p.grad for p in weights]
        torch._foreach_add_(gradients, weights, alpha=self.decay)
        ratios = [
            torch.where((w > 0) & (g > 0), self.trust * w / g, 1.0)
            for w, g in zip(torch._foreach_norm(weights), torch._foreach_norm(gradients), strict=True)
        ]
        torch._foreach_mul_(gradients, ratios)
        return super().step(closure)


def build(optim: Optim, parameters: Iterable[nn.Parameter]) -> torch.optim.SGD:
    """The configured optimizer. Fused kernels honour `found_inf`, so a step can be masked without a host sync."""
    if optim.name == "lars":
        return Lars(parameters, optim.lr, optim.momentum, optim.weight_decay, optim.trust)
    return torch.optim.SGD(
        parameters, lr=optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay, fused=True
    )


def step(optimizer: torch.optim.SGD, lr: float, skip: Tensor) -> None:
    """One update at rate lr, left out where skip (float32 scalar on the device) is 1."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.found_inf = skip  # type: ignore[attr-defined]
    optimizer.step()
