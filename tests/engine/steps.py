"""Training steps on images made up here: what the tests of the step share."""

from typing import Any

import torch
from torch import Tensor

from synco_fast.config import Config, parse
from synco_fast.engine import speed
from synco_fast.engine.distributed import Processes
from synco_fast.engine.run import build_contrast
from synco_fast.engine.step import TrainStep
from synco_fast.methods import MomentumContrast

BATCH, SIZE = 32, 32


def small_config(method: str = "synco", **sections: dict[str, Any]) -> Config:
    """A network that takes some 10 ms a step, with every kind of negative that the method has."""
    counts = {
        "moco": {},
        "mochi": {"n_hard": 64, "mixed": 16, "interpolated": 8},
        "synco": {"n_hard": 64, "interpolated": 16, "extrapolated": 16, "mixed": 16}
        | {"noisy": 8, "perturbed": 8, "adversarial": 8},
    }[method]
    values: dict[str, Any] = {
        "method": method,
        "data": {"batch_size": BATCH, "image_size": SIZE, "eval_resize": SIZE},
        "model": {"arch": "resnet10_narrow", "dim": 64, "momentum": 0.99},
        "bn": {"mode": "split", "group_size": 8},
        "queue": {"size": 256},
        "negatives": {**counts, "warmup_epochs": 0},
        "trainer": {"precision": "fp32"},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return parse(values, "a test")


def build(config: Config, device: str = "cpu") -> TrainStep:
    """A step at its start, everything as `pretrain` would have it."""
    processes = Processes(0, 1, torch.device(device))
    how = speed.resolve(config, processes)
    return TrainStep(config, processes, speed.apply(how, build_contrast(config, processes)), how)


def move_first_weights(step: TrainStep, seed: int) -> None:
    """Move each weight by one unit in its last place, up or down."""
    generator = torch.Generator().manual_seed(seed)
    encoder = step.contrast.query_encoder
    with torch.no_grad():
        for parameter in encoder.parameters():
            up = torch.rand(parameter.shape, generator=generator) < 0.5
            parameter.copy_(torch.nextafter(parameter, torch.where(up, torch.inf, -torch.inf)))
    step.contrast.key_encoder.load_state_dict(encoder.state_dict())


def views(step: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Two noisy views of a step's images, of which there are 128 in all."""
    images = torch.randn(128, 3, SIZE // 4, SIZE // 4, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1 + step)
    chosen = images[torch.randperm(128, generator=generator)[:BATCH]]
    large = torch.nn.functional.interpolate(chosen, scale_factor=4)
    pair = [large + 0.3 * torch.randn(large.shape, generator=generator) for _ in range(2)]
    query, key = (view.to(device).contiguous(memory_format=torch.channels_last) for view in pair)
    return query, key


def train(step: TrainStep, steps: int, lr: float = 0.1, start: int = 0) -> list[float]:
    """Losses of so many steps."""
    hard = step.config.negatives.hard()
    device = str(step.processes.device)
    losses = []
    for number in range(start, start + steps):
        step(views(number, device), hard, number, lr)
        loss = step.meter.read()["loss"]
        assert loss is not None
        losses.append(loss)
    return losses


def model_state(contrast: MomentumContrast) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in contrast.state_dict().items()}
