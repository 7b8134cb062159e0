"""Checkpoints as other projects write them, made with torch and torchvision and nothing of ours."""

from pathlib import Path
from typing import Any

import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import functional as transforms


def network(arch: str, head: str, seed: int) -> nn.Module:
    """torchvision's network with a head in the place of `fc`: MoCo's "v1" or "v2", 16 wide, or the "classifier".

    Batch norm has statistics and weights that show when they get lost.
    """
    torch.manual_seed(seed)
    model = torchvision.models.get_model(arch)
    width = model.fc.in_features
    if head == "v1":
        model.fc = nn.Linear(width, 16)
    elif head == "v2":
        model.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 16))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            module.num_batches_tracked.fill_(1234)
    return model.eval()


def pretraining(query: nn.Module, key: nn.Module, queue: Tensor, prefix: str = "module.") -> dict[str, Any]:
    """MoCo's checkpoint without its optimizer: after epoch 7, at row 32 of the queue."""
    tensors = {f"{prefix}queue": queue, f"{prefix}queue_ptr": torch.tensor([32])}
    for name, encoder in (("encoder_q", query), ("encoder_k", key)):
        tensors |= {f"{prefix}{name}.{inner}": value for inner, value in encoder.state_dict().items()}
    return {"epoch": 7, "arch": "resnet18", "state_dict": tensors}


def pixels(root: Path, count: int = 4) -> Tensor:
    """JPEGs below a folder as torchvision prepares them: (count, 3, 48, 48)."""
    files = sorted(root.rglob("*.jpg"))[:count]
    images = [transforms.to_tensor(Image.open(file).convert("RGB").resize((48, 48))) for file in files]
    return transforms.normalize(torch.stack(images), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


@torch.no_grad()
def embed(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Features and embeddings of torchvision's network: what goes into `fc`, and what comes out."""
    features: list[Tensor] = []
    hook = model.fc.register_forward_pre_hook(lambda module, inputs: features.append(inputs[0]))
    embeddings = model(images)
    hook.remove()
    return features[0], embeddings
