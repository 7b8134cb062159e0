"""Features of a labelled set under a frozen backbone."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


@torch.no_grad()
def extract(
    backbone: nn.Module, batches: Iterable[tuple[Tensor, Tensor | None]], *, device: torch.device, bf16: bool
) -> tuple[Tensor, Tensor]:
    """Run every batch through the backbone in evaluation mode, and put it back in the mode it was in.

    Args:
        backbone: images (B, 3, H, W) to features (B, F).
        batches: (images, labels); labels (B,) int64.
        device: of the backbone. bf16: run under autocast.

    Returns:
        Features (n, F) float32 and labels (n,) int64, both on the device; (0, 0) and (0,) of no batches.
    """
    training = backbone.training
    backbone.eval()
    features, labels = [], []
    try:
        for images, truth in batches:
            assert truth is not None, "features are extracted from labelled sets"
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                features.append(backbone(images if bf16 else images.float()).float())
            labels.append(truth.to(device))
    finally:
        backbone.train(training)
    if not features:
        return torch.empty(0, 0, device=device), torch.empty(0, dtype=torch.int64, device=device)
    return torch.cat(features), torch.cat(labels)
