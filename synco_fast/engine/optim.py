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


def build(optim: Optim, parameters: Iterable[nn.Parameter], *, apex: bool = False) -> torch.optim.Optimizer:
    """The configured optimizer; `apex`: NVIDIA's fused SGD. All of them can leave out a step without a host sync."""
    if optim.name == "lars":
        return _with_momentum(Lars(parameters, optim.lr, optim.momentum, optim.weight_decay, optim.trust))
    settings: dict[str, Any] = {"lr": optim.lr, "momentum": optim.momentum, "weight_decay": optim.weight_decay}
    if apex:
        from apex.optimizers import FusedSGD

        return FusedSGD(parameters, **settings)
    return _with_momentum(torch.optim.SGD(parameters, **settings, fused=True))


def _with_momentum(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Momentum of 0 where there is none: a first step that is left out would leave torch's as memory was."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            if optimizer.state[parameter].get("momentum_buffer") is None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def set_rate(optimizer: torch.optim.Optimizer, lr: float, on_device: Tensor | None) -> None:
    """Set the learning rate: as a number, or as a scalar that lives on the device and is kept up to date."""
    if on_device is not None:
        on_device.fill_(lr)
    for group in optimizer.param_groups:
        group["lr"] = lr if on_device is None else on_device


def fit_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Have momentum that was loaded lie in memory as its parameter does.

    A fused step goes through both in the order of memory, without a look at shapes or strides; a file's are those of
    whoever wrote it.

    Raises:
        ValueError: momentum does not fit its parameter.
    """
    for parameter, kept in optimizer.state.items():
        momentum = kept["momentum_buffer"]
        if momentum is None:
            continue
        if momentum.shape != parameter.shape:
            raise ValueError(f"momentum of shape {list(momentum.shape)} for {list(parameter.shape)}")
        kept["momentum_buffer"] = torch.empty_like(parameter, requires_grad=False).copy_(momentum)
    if isinstance(optimizer, torch.optim.SGD):
        _with_momentum(optimizer)


def step(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
    """One update, left out where skip (float32 scalar on the device) is 1."""
    if hasattr(optimizer, "_dummy_overflow_buf"):  # apex's kernels do nothing where this flag is set
        optimizer._dummy_overflow_buf.copy_(skip)
    else:  # so do PyTorch's fused ones, which take the flag of a gradient scaler
        optimizer.found_inf = skip  # type: ignore[attr-defined]
    optimizer.step()
