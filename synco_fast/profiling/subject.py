"""What is profiled: a run's step, and batches for it."""

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from synco_fast.config import DTYPES, Config
from synco_fast.data.index import Index
from synco_fast.engine import speed as speeds
from synco_fast.engine.distributed import Processes
from synco_fast.engine.run import build_contrast, build_loader
from synco_fast.engine.speed import Speed
from synco_fast.engine.step import TrainStep
from synco_fast.ops import HardNegatives

Views = Sequence[Tensor]


class Subject:
    """The step of a run as it is once synthetic negatives have begun, to be taken as often as wanted.

    Attributes:
        hard: the run's synthetic negatives. contrast: its model.
    """

    def __init__(self, config: Config, processes: Processes, speed: Speed) -> None:
        self.config, self.processes = config, processes
        self.hard = config.negatives.hard()
        self.contrast = speeds.apply(speed, build_contrast(config, processes))
        self._train_step = TrainStep(config, processes, self.contrast, speed)
        self._step = 0

    @property
    def device(self) -> torch.device:
        return self.processes.device

    def take(self, views: Views, hard: HardNegatives | None = None) -> None:
        """A training step on views, with the run's synthetic negatives or others."""
        self._train_step(views, self.hard if hard is None else hard, self._step, self.config.optim.lr)
        self._step += 1


class Batches:
    """Endless views for a process: of an index through the run's loader; without one, one random pair always."""

    def __init__(self, config: Config, processes: Processes, index: Index | None) -> None:
        self._close: Callable[[], None] | None = None
        self._views: Iterator[Views]
        if index is None:
            self._views = itertools.repeat(random_views(config, processes))
        else:
            loader = build_loader(config, processes, index, {})
            self._views, self._close = (batch.views for batch in loader), loader.close

    def __next__(self) -> Views:
        return next(self._views)

    def close(self) -> None:
        if self._close is not None:
            self._close()


def random_views(config: Config, processes: Processes) -> Views:
    """A process's two views (B, 3, H, W) of noise, in memory as the loader has them."""
    data = config.data
    shape = (data.batch_size // processes.world_size, 3, data.image_size, data.image_size)
    generator = torch.Generator().manual_seed(config.seed + processes.rank)
    return [
        torch.randn(shape, generator=generator)
        .to(processes.device, DTYPES[data.dtype])
        .contiguous(memory_format=torch.channels_last)
        for _ in range(2)
    ]
