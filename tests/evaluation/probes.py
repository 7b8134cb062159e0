"""What the tests of trained classifiers share: data, weights, and the protocols written out in plain torch."""

import json
import math
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from synco_fast.data.index import Index
from synco_fast.data.loader import EvalLoader, TrainLoader
from synco_fast.data.recipes import SUPERVISED
from synco_fast.engine import checkpoints
from tests.conftest import SYNCO_FAST, environment, write_images

CPU = torch.device("cpu")
SMALL = ["--set", "data.image_size=32", "--set", "data.eval_resize=32", "--set", "data.threads=1"]
"""Images of 32 px, for weights that do not say."""


def write_classes(root: Path, classes: int, train: int, held_out: int) -> Path:
    """So many JPEGs of each class in train/ and val/; nothing to be learnt."""
    for label in range(classes):
        write_images(root / "train" / f"class{label}", train, seed=2 * label)
        write_images(root / "val" / f"class{label}", held_out, seed=2 * label + 1)
    return root


def write_weights(path: Path, seed: int = 0) -> Path:
    """torchvision's resnet18 at a random start, as its state dict."""
    torch.manual_seed(seed)
    torch.save(torchvision.models.resnet18().state_dict(), path)
    return path


def backbone_of(weights: Path) -> nn.Module:
    """torchvision's resnet18 with weights, its classifier taken off, in float64."""
    network = torchvision.models.resnet18()
    network.load_state_dict(torch.load(weights, weights_only=True), strict=False)
    network.fc = nn.Identity()
    return network.double()


def commanded(command: str, weights: Path, data: Path, output: Path, *options: object) -> list[str]:
    """Arguments of `synco-fast` on a CPU."""
    named = [command, weights, "--data", data, "--output", output, "--device", "cpu", *SMALL, *options]
    return [str(word) for word in named]


def process(arguments: list[str]) -> list[str]:
    """The command as a process of its own."""
    return [*SYNCO_FAST, *arguments]


def signalled(
    command: list[str], text: str, number: int, *, saved_in: Path | None = None, pause: float = 0.0
) -> tuple[int, str]:
    """Start a run, send it a signal once it has said a line that begins so; its exit code and what it said.

    With `saved_in`, its output, the signal waits for the checkpoint after that line; then for `pause` seconds.
    """
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment())
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if line.startswith(text):
            step = int(line.split()[1].partition("/")[0])
            while saved_in is not None and _saved_step(saved_in) < step:
                time.sleep(0.01)
            time.sleep(pause)
            process.send_signal(number)
            break
    seen += process.stderr.readlines()
    return process.wait(), "".join(seen)


def _saved_step(output: Path) -> int:
    latest = checkpoints.folder(output) / checkpoints.LATEST
    return (checkpoints.step_of(latest.readlink()) or 0) if latest.is_symlink() else 0


def result_of(output: Path) -> dict[str, Any]:
    """`result.json` without how and when it was made."""
    result = json.loads((output / "result.json").read_text())
    del result["about"]
    return result


@dataclass
class ByHand:
    """What a training by hand came to.

    Attributes:
        backbone, head: trained. losses: of each step. accuracies: after each epoch, top1 and top5.
    """

    backbone: nn.Module
    head: nn.Linear
    losses: list[float] = field(default_factory=list)
    accuracies: list[dict[str, float]] = field(default_factory=list)


def trained_by_hand(
    weights: Path,
    index: Index,
    test: Index,
    *,
    epochs: int,
    batch_size: int,
    rates: Callable[[int], list[float]],
    weight_decay: float,
    frozen: bool,
    parts: int = 1,
) -> ByHand:
    """SGD with momentum 0.9 in float64, written out; batches and the head's start are those of seed 0.

    Args:
        rates: of the backbone and of the head, by epoch. frozen: only the head learns.
        parts: processes; each has batch norm statistics of its own part of a batch, and the first one's are kept.
    """
    torch.manual_seed(0)
    head = nn.Linear(512, len(index.classes))
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    hand = ByHand(backbone_of(weights), head.double())
    groups = [list(hand.backbone.parameters()), list(hand.head.parameters())]
    momenta = [[torch.zeros_like(weight) for weight in group] for group in groups]
    loader = TrainLoader(
        index,
        batch_size=batch_size,
        image_size=32,
        recipe=SUPERVISED,
        seed=0,
        views=1,
        device=CPU,
        threads=1,
        prefetch=1,
    )
    assert index.labels is not None
    for epoch in range(epochs):
        for _ in range(len(index) // batch_size):
            batch = next(loader)
            hand.backbone.train(not frozen)
            pieces = zip(batch.views[0].chunk(parts), index.labels[batch.samples].chunk(parts), strict=True)
            losses = [_loss(hand, images, labels, first=i == 0) for i, (images, labels) in enumerate(pieces)]
            loss = torch.stack(losses).mean()
            hand.losses.append(loss.item())
            for group, momentum, rate in list(zip(groups, momenta, rates(epoch), strict=True))[frozen:]:
                for weight, kept, gradient in zip(
                    group, momentum, torch.autograd.grad(loss, group, retain_graph=True), strict=True
                ):
                    kept.mul_(0.9).add_(gradient + weight_decay * weight.detach())
                    weight.data -= rate * kept
        hand.accuracies.append(accuracy_by_hand(hand, test))
    loader.close()
    return hand


def _loss(hand: ByHand, images: Tensor, labels: Tensor, first: bool) -> Tensor:
    for module in hand.backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1 if first else 0.0
    scores = hand.head(hand.backbone(images.double())).log_softmax(dim=1)
    return -scores[torch.arange(len(labels)), labels].mean()


@torch.no_grad()
def accuracy_by_hand(hand: ByHand, test: Index) -> dict[str, float]:
    """Image by image, by counting classes with a higher score."""
    hand.backbone.eval()
    ranks = []
    for images, labels in EvalLoader(
        test, batch_size=4, image_size=32, resize=32, dtype=torch.float32, device=CPU, threads=1, prefetch=1
    ):
        assert labels is not None
        for scores, label in zip(hand.head(hand.backbone(images.double())), labels.tolist(), strict=True):
            ranks.append(int((scores > scores[label]).sum()))
    return {f"top{k}": sum(rank < k for rank in ranks) / len(ranks) for k in (1, 5)}


def cosine(epoch: int, epochs: int) -> float:
    """The factor of a cosine that moves by epochs."""
    return (1 + math.cos(math.pi * epoch / epochs)) / 2
