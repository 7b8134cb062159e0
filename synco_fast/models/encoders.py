"""Encoders: a torchvision residual network, its classifier replaced by a projection head."""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock, Bottleneck

from synco_fast.errors import UserError

_FAMILIES = ("resnet", "resnext", "wide_resnet")
NARROW = "resnet10_narrow"


def architectures() -> list[str]:
    """Names of the encoders: torchvision's residual networks, and `resnet10_narrow`, which a CPU trains in minutes."""
    names = torchvision.models.list_models(torchvision.models)
    return [NARROW, *(name for name in names if name.startswith(_FAMILIES))]


class Encoder(nn.Module):
    """Images (B, 3, H, W) to embeddings (B, dim): backbone, then head. Neither is normalised.

    Args:
        arch: a name in `architectures()`.
        stem: "imagenet", or "cifar" for images of 32 px: a 3x3 convolution of stride 1 and no max-pool. The narrow
            network has one stem, of stride 2.
        dim: D, dimension of the embedding; None: there is no head, the features are the embedding.
        mlp: 2-layer MLP head (MoCo v2, arXiv 2003.04297), else one linear layer (MoCo v1).

    Attributes:
        backbone: images (B, 3, H, W) to features (B, width). head: features to embeddings.

    Raises:
        UserError: no such architecture.
    """

    def __init__(self, arch: str, *, stem: str = "imagenet", dim: int | None = 128, mlp: bool = True) -> None:
        super().__init__()
        if arch not in architectures():
            raise UserError(f"model.arch = {arch!r}: no such encoder; choose one of {', '.join(architectures())}")
        self.backbone, self.width = _narrow_backbone() if arch == NARROW else _torchvision_backbone(arch, stem)
        hidden = [nn.Linear(self.width, self.width), nn.ReLU()] if mlp else []
        self.head = nn.Identity() if dim is None else nn.Sequential(*hidden, nn.Linear(self.width, dim))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))


def _torchvision_backbone(arch: str, stem: str) -> tuple[nn.Module, int]:
    """A network of torchvision's without its classifier, and the number of its features."""
    backbone = torchvision.models.get_model(arch, weights=None)
    if stem == "cifar":
        backbone.conv1 = nn.Conv2d(3, backbone.conv1.out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(backbone.conv1.weight, mode="fan_out", nonlinearity="relu")
        backbone.maxpool = nn.Identity()
    width = backbone.fc.in_features
    backbone.fc = nn.Identity()
    return backbone, width


def _narrow_backbone() -> tuple[nn.Module, int]:
    """A stem and four basic blocks, 24 to 192 channels wide, halving the resolution each; 192 features."""
    width = 24
    layers: list[nn.Module] = [
        nn.Conv2d(3, width, 5, stride=2, padding=2, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    ]
    for wider in (width, 2 * width, 4 * width, 8 * width):
        shortcut = nn.Sequential(nn.Conv2d(width, wider, 1, stride=2, bias=False), nn.BatchNorm2d(wider))
        layers.append(BasicBlock(width, wider, stride=2, downsample=shortcut))
        width = wider
    backbone = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return backbone, width


def low_precision_copy(encoder: nn.Module) -> nn.Module:
    """A copy whose convolutions and linear layers are bfloat16, and whose batch norm layers are the encoder's own.

    Under autocast it computes what the encoder does, without casting weights at every call. `momentum_update` keeps it
    in step.
    """
    norms = {id(module): module for module in encoder.modules() if isinstance(module, _BatchNorm)}
    twin = copy.deepcopy(encoder, norms)  # what deepcopy is told it has copied already is shared
    for module in twin.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.to(torch.bfloat16)
    return twin


@torch.no_grad()
def momentum_update(
    key_encoder: nn.Module, query_encoder: nn.Module, momentum: float, twin: nn.Module | None = None
) -> None:
    """key <- momentum key + (1 - momentum) query, parameters only (MoCo, arXiv 1911.05722, eq. 2).

    One fused multi-tensor update, and one more for the key encoder's low-precision twin. The key encoder's batch norm
    buffers are its own, as in MoCo.
    """
    keys: list[Tensor] = list(key_encoder.parameters())
    torch._foreach_lerp_(keys, list(query_encoder.parameters()), 1 - momentum)
    if twin is not None:
        pairs = [(low, key) for low, key in zip(twin.parameters(), keys, strict=True) if low is not key]
        torch._foreach_copy_([low for low, _ in pairs], [key for _, key in pairs])


def recompute_activations(encoder: nn.Module) -> None:
    """Have the encoder's residual blocks keep their inputs only, and compute the rest again in backward, in place."""
    for module in encoder.modules():
        if isinstance(module, (BasicBlock, Bottleneck)):
            module.forward = functools.partial(_recomputed, module, module.forward)


def _recomputed(block: nn.Module, forward: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(images)
    context = functools.partial(_statistics_taken_once, block)
    return checkpoint(forward, images, use_reentrant=False, preserve_rng_state=False, context_fn=context)


def _statistics_taken_once(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For the forward pass and for computing it again, which must not move batch norm's running statistics."""
    return contextlib.nullcontext(), _statistics_frozen(block)


@contextlib.contextmanager
def _statistics_frozen(block: nn.Module) -> Iterator[None]:
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm) and module.training]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0  # running <- 1 running + 0 batch
    try:
        yield
    finally:
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum
            assert norm.num_batches_tracked is not None
            norm.num_batches_tracked.sub_(1)
