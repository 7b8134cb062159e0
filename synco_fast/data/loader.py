"""Loaders: an index in, batches of torch tensors out.

A training loader's whole state is (epoch, step). Order and view parameters are pure functions of the seed and
the place, so starting at (epoch, step) gives the batches, bit for bit, that a loader which iterated there
would give, and the ranks' rows together are the rows of a single process.
"""

import itertools
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from synco_fast.data.numbers import evaluation_numbers, view_numbers
from synco_fast.data.operator import Augmentation
from synco_fast.data.order import Position, batch_positions, batch_samples, epoch_order, steps_per_epoch
from synco_fast.data.pipeline import VIEWS, Arrays, evaluation_pipeline, train_pipeline
from synco_fast.data.recipes import Recipe
from synco_fast.data.samples import Index
from synco_fast.data.stream import Request, Stream
from synco_fast.data.views import view_parameters
from synco_fast.errors import UserError


@dataclass(frozen=True, eq=False)
class Batch:
    """Two views of one rank's rows: each (B, 3, H, W), channels-last; and the place they belong to."""

    views: tuple[Tensor, Tensor]
    epoch: int
    step: int


class TrainLoader:
    """Endless iterator of `Batch`; an epoch's last batch is followed by the next epoch's first."""

    def __init__(
        self,
        index: Index,
        *,
        batch_size: int,
        image_size: int,
        recipe: Recipe,
        seed: int,
        dtype: torch.dtype = torch.float32,
        augmentation: Augmentation = "auto",
        device: torch.device,
        threads: int,
        prefetch: int,
        rank: int = 0,
        world_size: int = 1,
        epoch: int = 0,
        step: int = 0,
    ) -> None:
        """Open at a place; nothing is read before the first batch is asked for.

        Args:
            index: the images.
            batch_size: rows of the global batch, a multiple of world_size.
            image_size: height and width of a view, pixels.
            recipe: distribution of the views.
            seed: of order and views.
            dtype: torch.float32 or torch.float16.
            augmentation: implementation of the views: compiled, plain, or auto: compiled where it can be used.
            device: where decoding and the batches are.
            threads: DALI's CPU threads, and as many that read files.
            prefetch: batches made ahead.
            rank, world_size: rank r gets rows [r * local, (r + 1) * local), local = batch_size // world_size.
            epoch, step: the first batch to give; a step past the epoch's end counts on into the next.

        Raises:
            UserError: fewer images than one batch, or a batch that the ranks cannot share equally.
        """
        self.steps_per_epoch = steps_per_epoch(len(index), batch_size)
        local = len(batch_positions(batch_size, 0, rank, world_size))
        self._index = index
        self._batch_size = batch_size
        self._image_size = image_size
        self._recipe = recipe
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._device = device
        self._threads = threads
        self._prefetch = prefetch
        self._build = partial(
            train_pipeline,
            batch_size=local,
            image_size=image_size,
            recipe=recipe,
            dtype=dtype,
            augmentation=augmentation,
            device=device,
            threads=threads,
            prefetch=prefetch,
        )
        self._next = Position(epoch, step).global_step(self.steps_per_epoch)
        self._stream: Stream | None = None

    def __iter__(self) -> "TrainLoader":
        return self

    def __next__(self) -> Batch:
        """The batch at the current place, which then moves on by one.

        Raises:
            UserError: a file of this batch cannot be read or decoded; names the file.
        """
        if self._stream is None:
            self._stream = Stream(
                self._build,
                self._requests(self._next),
                device=self._device,
                threads=self._threads,
                prefetch=self._prefetch,
            )
        first, second = (images.permute(0, 3, 1, 2) for images in next(self._stream))
        place = Position.at(self._next, self.steps_per_epoch)
        self._next += 1
        return Batch((first, second), place.epoch, place.step)

    def files_at(self, epoch: int, step: int) -> list[str]:
        """File names of the global batch at a place, in row order, relative to the index's root."""
        samples = batch_samples(len(self._index), self._batch_size, self._seed, epoch, step)
        return [self._index.files[i] for i in samples.tolist()]

    def close(self) -> None:
        """Stop reading; batches already handed out stay valid."""
        if self._stream is not None:
            self._stream.close()

    def _requests(self, first: int) -> Iterator[Request]:
        shard = (self._rank, self._world_size)
        for global_step in itertools.count(first):
            epoch, step = divmod(global_step, self.steps_per_epoch)
            if step == 0 or global_step == first:
                # Ordering a million samples takes a second, so the next epoch's order is cached in advance.
                threading.Thread(target=epoch_order, args=(len(self._index), self._seed, epoch + 1)).start()
            samples = batch_samples(len(self._index), self._batch_size, self._seed, epoch, step, *shard)
            positions = batch_positions(self._batch_size, step, *shard)
            yield Request([self._index.sample(i) for i in samples.tolist()], partial(self._inputs, epoch, positions))

    def _inputs(self, epoch: int, positions: Tensor, sizes: Tensor) -> Arrays:
        views = (view_parameters(sizes, self._recipe, self._seed, epoch, positions, view) for view in range(VIEWS))
        return [view_numbers(parameters, self._recipe, self._image_size).numpy() for parameters in views]


class EvalLoader:
    """One pass, in index order, over resized and centre-cropped images; every sample exactly once.

    Iterating again starts another pass.
    """

    def __init__(
        self,
        index: Index,
        *,
        batch_size: int,
        image_size: int,
        resize: int,
        dtype: torch.dtype,
        augmentation: Augmentation = "auto",
        device: torch.device,
        threads: int,
        prefetch: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Set up; nothing is read before the pass starts.

        Args:
            index: the images.
            batch_size: rows per batch of this rank; the last batch may be shorter.
            image_size: height and width of the crop, pixels.
            resize: length of the shorter side before cropping, at least image_size.
            dtype, augmentation, device, threads, prefetch: as for `TrainLoader`.
            rank, world_size: rank r gets the r-th of world_size contiguous, nearly equal slices.

        Raises:
            UserError: the crop is larger than the resized image.
        """
        if resize < image_size:
            raise UserError(f"images resized to {resize} pixels are too small for crops of {image_size}")
        self._index = index
        self._batch_size = batch_size
        self._sizes = (resize, image_size)
        self._device = device
        self._threads = threads
        self._prefetch = prefetch
        self._build = partial(
            evaluation_pipeline,
            batch_size=batch_size,
            image_size=image_size,
            dtype=dtype,
            augmentation=augmentation,
            device=device,
            threads=threads,
            prefetch=prefetch,
        )
        bounds = [len(index) * r // world_size for r in (rank, rank + 1)]
        starts = range(bounds[0], bounds[1], batch_size)
        self._rows = [range(start, min(start + batch_size, bounds[1])) for start in starts]

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._rows)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield (images, labels): (B, 3, H, W) channels-last, and (B,) int64 on the same device or None.

        Raises:
            UserError: a file cannot be read or decoded; names the file.
        """
        stream = Stream(
            self._build, self._requests(), device=self._device, threads=self._threads, prefetch=self._prefetch
        )
        try:
            for rows, (images,) in zip(self._rows, stream, strict=True):
                labels = self._index.labels
                yield (
                    images.permute(0, 3, 1, 2),
                    None if labels is None else labels[rows.start : rows.stop].to(self._device),
                )
        finally:
            stream.close()

    def _requests(self) -> Iterator[Request]:
        for rows in self._rows:
            yield Request([self._index.sample(i) for i in rows], self._inputs)

    def _inputs(self, sizes: Tensor) -> Arrays:
        return [evaluation_numbers(sizes, *self._sizes).numpy()]
