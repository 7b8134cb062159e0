"""Encoders: a torchvision residual network, its classifier replaced by a projection head."""

import torch
import torchvision
from torch import Tensor, nn

from synco_fast.errors import UserError

_FAMILIES = ("resnet", "resnext", "wide_resnet")


def architectures() -> list[str]:
    """Names of the encoders: torchvision's residual networks."""
    return [name for name in torchvision.models.list_models(torchvision.models) if name.startswith(_FAMILIES)]


class Encoder(nn.Module):
    """Images (B, 3, H, W) to embeddings (B, dim): backbone, then head. Neither is normalised.

    Args:
        arch: a name in `architectures()`.
        stem: "imagenet", or "cifar" for images of 32 px: a 3x3 convolution of stride 1 and no max-pool.
        dim: D, dimension of the embedding.
        mlp: 2-layer MLP head (MoCo v2, arXiv 2003.04297), else one linear layer (MoCo v1).

    Raises:
        UserError: no such architecture.
    """

    def __init__(self, arch: str, *, stem: str = "imagenet", dim: int = 128, mlp: bool = True) -> None:
        super().__init__()
        if arch not in architectures():
            raise UserError(f"model.arch = {arch!r}: no such encoder; choose one of {', '.join(architectures())}")
        backbone = torchvision.models.get_model(arch, weights=None)
        if stem == "cifar":
            backbone.conv1 = nn.Conv2d(3, backbone.conv1.out_channels, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(backbone.conv1.weight, mode="fan_out", nonlinearity="relu")
            backbone.maxpool = nn.Identity()
        width = backbone.fc.in_features
        backbone.fc = nn.Identity()
        self.backbone = backbone
        hidden = [nn.Linear(width, width), nn.ReLU()] if mlp else []
        self.head = nn.Sequential(*hidden, nn.Linear(width, dim))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))


@torch.no_grad()
def momentum_update(key_encoder: nn.Module, query_encoder: nn.Module, momentum: float) -> None:
    """key <- momentum key + (1 - momentum) query, parameters only (MoCo, arXiv 1911.05722, eq. 2).

    One fused multi-tensor update. The key encoder's batch norm buffers are its own, as in MoCo.
    """
    torch._foreach_lerp_(list(key_encoder.parameters()), list(query_encoder.parameters()), 1 - momentum)
