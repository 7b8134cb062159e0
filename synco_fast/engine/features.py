"""Features of a labelled set under a frozen backbone."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

Batches = Iterable[tuple[Tensor, Tensor | None]]


@torch.no_grad()
def features_of(
    backbone: nn.Module, batches: Batches, *, device: torch.device, bf16: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Run batch by batch through the backbone in evaluation mode, and put it back in the mode it was in at the end.

    Args:
        backbone: images (B, 3, H, W) to features (B, F).
        batches: (images, labels); labels (B,) int64.
        device: of the backbone. bf16: run under autocast.

    Yields:
        Features (B, F) float32 and labels (B,) int64 of each batch, both on the device.
    """
    training = backbone.training
    backbone.eval()
    try:
        for images, truth in batches:
            assert truth is not None, "features are extracted from labelled sets"
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                features = backbone(images if bf16 else images.float()).float()
            yield features, truth.to(device)
    finally:
        backbone.train(training)


def extract(backbone: nn.Module, batches: Batches, *, device: torch.device, bf16: bool) -> tuple[Tensor, Tensor]:
    """All of them: features (n, F) float32 and labels (n,) int64; (0, 0) and (0,) of no batches."""
    found = list(features_of(backbone, batches, device=device, bf16=bf16))
    if not found:
        return torch.empty(0, 0, device=device), torch.empty(0, dtype=torch.int64, device=device)
    features, labels = zip(*found, strict=True)
    return torch.cat(features), torch.cat(labels)
