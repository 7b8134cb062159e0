"""What kNN accuracy is worth without pretraining: raw pixels, and the encoder before its first step."""

import copy

import torch
from torch import nn

from synco_fast.engine.features import Batches, extract
from synco_fast.engine.knn import knn_accuracy


def knn_baselines(
    backbone: nn.Module,
    bank: Batches,
    held_out: Batches,
    shuffled: Batches,
    *,
    k: int,
    temperature: float,
    device: torch.device,
    bf16: bool,
) -> dict[str, float]:
    """kNN accuracy of features that nothing was learnt for.

    Args:
        backbone: images (B, 3, H, W) to features (B, F) at its random start, with plain batch norm; left as it is.
        bank, held_out: (images, labels) of the training and the held-out set; iterated several times.
        shuffled: training images in a random order, so that each batch is a fair sample.
        k: neighbours, at most as many as the bank has. temperature: of their votes.
        device: of the backbone. bf16: run it under autocast.

    Returns:
        raw_pixels: the evaluation's own crops, flattened, less the bank's mean image.
        random_initialisation: the backbone as it is, its batch norm statistics still 0 and 1.
        random_initialisation_calibrated: the same weights, with the batch norm statistics of `shuffled`.
    """

    def accuracy(module: nn.Module, *, centred: bool = False) -> float:
        (bank_rows, bank_labels), (rows, labels) = (
            extract(module, batches, device=device, bf16=bf16) for batches in (bank, held_out)
        )
        if centred:
            mean = bank_rows.mean(dim=0)
            bank_rows, rows = bank_rows - mean, rows - mean
        return knn_accuracy(bank_rows, bank_labels, rows, labels, k=min(k, len(bank_rows)), temperature=temperature)

    return {
        "raw_pixels": accuracy(nn.Flatten(), centred=True),
        "random_initialisation": accuracy(backbone),
        "random_initialisation_calibrated": accuracy(calibrated(backbone, shuffled, device=device, bf16=bf16)),
    }


@torch.no_grad()
def calibrated(backbone: nn.Module, batches: Batches, *, device: torch.device, bf16: bool) -> nn.Module:
    """A copy of the backbone whose batch norm statistics are the plain means of those of the batches."""
    backbone = copy.deepcopy(backbone).train()
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    for images, _ in batches:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            backbone(images if bf16 else images.float())
    return backbone.eval()
