"""`synco-fast linear`: MoCo's linear probe (arXiv 1911.05722, section 4.1): one linear layer on a frozen backbone."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from synco_fast.data import operator
from synco_fast.errors import UserError
from synco_fast.evaluation.classifier import Protocol, Training, check_batch
from synco_fast.evaluation.journal import FILES, Journal
from synco_fast.evaluation.session import RESULT, Request, opened
from synco_fast.files import write_atomically

HEAD = "head.safetensors"
"""The linear layer: `weight` (classes, features) and `bias` (classes,), of features as the backbone gives them."""


def linear(
    request: Request,
    *,
    epochs: int,
    lr: float,
    batch_size: int,
    milestones: Sequence[int] | None,
    seed: int,
    resume: str | None,
) -> dict[str, Any]:
    """Train the layer on augmented images, and measure it on held-out ones after each epoch.

    Args:
        lr: at the start, used as it is. milestones: epochs at which it falls to a tenth; None: at 60% and 80%.
        resume: None to start, "auto" to go on if there is something to go on with, or a checkpoint's path.

    Returns:
        What `result.json` holds; `metrics.top1` and `top5` are the last epoch's.

    Raises:
        UserError: see `opened`; an option cannot be used, or the loss was not finite.
        Interrupted: by a signal, with the state saved.
    """
    milestones = checked(epochs, lr, milestones)
    protocol = Protocol(epochs, batch_size, seed, lr, None, 0.0, tuple(milestones))
    settings = {"epochs": epochs, "lr": lr, "batch_size": batch_size, "milestones": milestones, "seed": seed}
    with opened("linear", request, {*FILES, HEAD}) as session:
        check_batch(batch_size, len(session.bank), session, session.bank.root.name + "/")
        operator.resolve(session.data.augmentation, session.processes.device)
        journal = Journal(session, settings, resume)
        training = Training(session, protocol, session.bank, session.held_out, journal)
        with journal.opened(training.total_steps):
            last = training.run()
        check_unchanged(training.model.backbone, session.weights.encoder.backbone.state_dict())
        if session.processes.is_main:
            write_head(request.output, training.model.head.weight, training.model.head.bias)
        best = max(range(epochs), key=lambda epoch: training.accuracies[epoch]["top1"])
        top1 = training.accuracies[best]["top1"]
        session.say(f"linear probe: top-1 {last['top1']:.2%}, top-5 {last['top5']:.2%} after epoch {epochs}")
        session.say(f"best top-1 {top1:.2%} after epoch {best + 1}; {request.output / RESULT}")
        return session.write(
            last,
            settings,
            protocol="probe",
            best={"epoch": best + 1, "top1": top1},
            epochs=training.accuracies,
        )


def check_unchanged(backbone: nn.Module, loaded: Mapping[str, Tensor]) -> None:
    """Make sure that a frozen backbone is, bit for bit, what was loaded: parameters and buffers.

    Raises:
        RuntimeError: it is not, so what was measured is not a probe of these weights.
    """
    state = backbone.state_dict()
    changed = sorted(state.keys() ^ loaded.keys())
    changed += [name for name in state if name in loaded and not torch.equal(_bits(state[name]), _bits(loaded[name]))]
    if changed:
        raise RuntimeError(f"the frozen backbone changed in training: {len(changed)} tensors, {changed[0]} among them")


def write_head(folder: Path, weight: Tensor, bias: Tensor) -> None:
    """Write the linear layer: weight (classes, features) and bias (classes,)."""
    tensors = {"weight": weight, "bias": bias}
    content = safetensors.torch.save({name: value.detach().cpu().contiguous() for name, value in tensors.items()})
    write_atomically(folder / HEAD, lambda file: file.write(content))


def checked(epochs: int, lr: float, milestones: Sequence[int] | None) -> list[int]:
    """The milestones of a probe whose options can be used: see `linear`.

    Raises:
        UserError: they cannot.
    """
    if not 0 < lr < math.inf:
        raise UserError(f"--lr {lr:g}: expected a number above 0")
    if milestones is None:
        return [epoch for epoch in (epochs * 3 // 5, epochs * 4 // 5) if epoch > 0]  # of 2 epochs, both are the second
    if list(milestones) != sorted(set(milestones)) or milestones[-1] >= epochs:
        text = ",".join(map(str, milestones))
        raise UserError(f"--milestones {text}: must ascend without repeats, and be below --epochs {epochs}")
    return list(milestones)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
