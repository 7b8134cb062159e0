"""Loaders: an index in, batches of torch tensors out.

A training loader's whole state is (epoch, step, skipped): the next batch, and the bad samples met so far in the order
they were met. Order and view parameters are pure functions of that and the seed, so starting there gives the batches,
bit for bit, that a loader which iterated there would give. The ranks' rows together are the rows of a single process
until the first bad file; from then on each rank fills its own gaps (`order.rank_order`).
"""

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from synco_fast.data.corrupt import BadSamples, OnCorrupt
from synco_fast.data.numbers import evaluation_numbers, view_numbers
from synco_fast.data.operator import Augmentation
from synco_fast.data.order import batch_positions, rank_order, steps_per_epoch
from synco_fast.data.pipeline import Arrays, evaluation_pipeline, train_pipeline
from synco_fast.data.reader import BadFile
from synco_fast.data.recipes import Recipe
from synco_fast.data.samples import Index
from synco_fast.data.stream import Request, Stream
from synco_fast.data.views import view_parameters
from synco_fast.errors import UserError


@dataclass(frozen=True, eq=False)
class Batch:
    """Views of one rank's rows: each (B, 3, H, W), channels-last; their place, and their samples (B,) int64, on the
    CPU.
    """

    views: tuple[Tensor, ...]
    epoch: int
    step: int
    samples: Tensor


class TrainLoader:
    """Endless iterator of `Batch`; an epoch's last batch is followed by the next epoch's first.

    Attributes:
        epoch, step: place of the next batch; step may be the epoch's number of steps, which is the next one's 0.
        steps_per_epoch: of an epoch without bad files.
        bad: the bad samples that this rank has met.
    """

    def __init__(
        self,
        index: Index,
        *,
        batch_size: int,
        image_size: int,
        recipe: Recipe,
        seed: int,
        views: int = 2,
        dtype: torch.dtype = torch.float32,
        augmentation: Augmentation = "auto",
        device: torch.device,
        threads: int,
        prefetch: int,
        rank: int = 0,
        world_size: int = 1,
        epoch: int = 0,
        step: int = 0,
        on_corrupt: OnCorrupt = "fail",
        skipped: Sequence[int] = (),
    ) -> None:
        """Open at a place; nothing is read before the first batch is asked for.

        Args:
            index: the images.
            batch_size: rows of the global batch, a multiple of world_size.
            image_size: height and width of a view, pixels.
            recipe: distribution of the views.
            seed: of order and views.
            views: of each image.
            dtype: torch.float32 or torch.float16.
            augmentation: implementation of the views: compiled, plain, or auto: compiled where it can be used.
            device: where decoding and the batches are.
            threads: DALI's CPU threads, and as many that read files.
            prefetch: batches made ahead.
            rank, world_size: rank r gets rows [r * local, (r + 1) * local), local = batch_size // world_size.
            epoch, step: the first batch to give; a step past the epoch's end counts on into the next.
            on_corrupt: what a bad file does: end the iteration, or leave its row to a spare sample.
            skipped: samples known to be bad, as `bad.found` of a loader at this place.

        Raises:
            UserError: fewer images than one batch, or a batch that the ranks cannot share equally.
        """
        self.steps_per_epoch = steps_per_epoch(len(index), batch_size)
        self.epoch, self.step = epoch, step
        self.bad = BadSamples(index, device, on_corrupt, skipped)
        self._local = len(batch_positions(batch_size, 0, rank, world_size))
        self._index = index
        self._batch_size = batch_size
        self._image_size = image_size
        self._recipe = recipe
        self._seed = seed
        self._views = views
        self._shard = (rank, world_size)
        self._device = device
        self._threads = threads
        self._prefetch = prefetch
        self._build = partial(
            train_pipeline,
            batch_size=self._local,
            image_size=image_size,
            recipe=recipe,
            views=views,
            dtype=dtype,
            augmentation=augmentation,
            device=device,
            threads=threads,
            prefetch=prefetch,
        )
        self._stream: Stream | None = None

    def __iter__(self) -> "TrainLoader":
        return self

    def __next__(self) -> Batch:
        """The batch at the current place, which then moves on by one.

        Raises:
            UserError: a file of this batch is bad and on_corrupt is `fail`, or there is nothing left to replace it by.
        """
        while True:
            samples = self._samples()
            self._stream = self._stream or Stream(
                self._build,
                self._requests(self.epoch, self.step),
                device=self._device,
                threads=self._threads,
                prefetch=self._prefetch,
            )
            try:
                views = tuple(images.permute(0, 3, 1, 2) for images in next(self._stream))
                break
            except (BadFile, RuntimeError) as error:
                self.close()  # and with it what was read ahead
                self.bad.add_from(samples.tolist(), error)
        batch = Batch(views, self.epoch, self.step, samples)
        self.step += 1
        return batch

    def files(self, samples: Tensor) -> list[str]:
        """Names of samples' files, relative to the index's root."""
        return [self._index.files[i] for i in samples.tolist()]

    def labels(self, samples: Tensor) -> Tensor:
        """Classes of samples, int64, on the CPU; of a labelled index."""
        assert self._index.labels is not None, "the index has labels"
        return self._index.labels[samples]

    def close(self) -> None:
        """Stop reading; batches already handed out stay valid."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _samples(self) -> Tensor:
        """This rank's samples at the current place, after moving on from an epoch's end."""
        while True:
            order = self._order(self.epoch)
            steps = self._steps(order)
            if steps == 0:
                raise self._used_up()
            if self.step < steps:
                return order[self.step * self._local : (self.step + 1) * self._local]
            # Samples that were skipped on other ranks may have shortened this epoch to less than was done of it.
            self.epoch, self.step = self.epoch + 1, max(0, self.step - max(steps, self.steps_per_epoch))

    def _order(self, epoch: int) -> Tensor:
        found = tuple(self.bad.found)
        return rank_order(len(self._index), self._batch_size, self._seed, epoch, *self._shard, found)

    def _steps(self, order: Tensor) -> int:
        """Steps of an epoch in this order; 0 if it cannot be gone through. Several ranks must all have the same."""
        steps = len(order) // self._local
        if self._shard[1] == 1:
            return steps
        return self.steps_per_epoch if steps >= self.steps_per_epoch else 0

    def _used_up(self) -> UserError:
        n, found = len(self._index), len(self.bad.found)
        rank, world_size = self._shard
        left = f"{n - found} of {n} images are left, fewer than one batch of {self._batch_size}"
        if world_size > 1:
            left = f"process {rank} has no sample left in its share of the epoch's {n % self._batch_size} spare ones"
        return UserError(
            f"{found} bad files were skipped, and {left}; list the good ones with `synco-fast data verify "
            f"{self._index.root} --output FILE` and start anew with that list as data.root"
        )

    def _requests(self, epoch: int, step: int) -> Iterator[Request]:
        while True:
            order = self._order(epoch)
            # Ordering a million samples takes a second, so the next epoch's order is cached in advance.
            threading.Thread(target=self._order, args=(epoch + 1,)).start()
            steps = self._steps(order)
            if steps == 0:
                return  # `_samples` says why when it comes here
            for place in range(step, steps):
                samples = order[place * self._local : (place + 1) * self._local]
                positions = batch_positions(self._batch_size, place, *self._shard)
                yield Request(
                    [self._index.sample(i) for i in samples.tolist()], partial(self._inputs, epoch, positions)
                )
            epoch, step = epoch + 1, 0

    def _inputs(self, epoch: int, positions: Tensor, sizes: Tensor) -> Arrays:
        draw = partial(view_parameters, sizes, self._recipe, self._seed, epoch, positions)
        return [view_numbers(draw(i), self._recipe, self._image_size).numpy() for i in range(self._views)]


class EvalLoader:
    """One pass, in index order, over resized and centre-cropped images; every sample exactly once.

    Iterating again starts another pass. With on_corrupt `skip`, bad files are left out with their labels.
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
        on_corrupt: OnCorrupt = "fail",
        skipped: Sequence[int] = (),
    ) -> None:
        """Set up; nothing is read before the pass starts.

        Args:
            index: the images.
            batch_size: rows per batch of this rank; the last batch may be shorter.
            image_size: height and width of the crop, pixels.
            resize: length of the shorter side before cropping, at least image_size.
            dtype, augmentation, device, threads, prefetch: as for `TrainLoader`.
            rank, world_size: rank r gets the r-th of world_size contiguous, nearly equal slices.
            on_corrupt, skipped: as for `TrainLoader`.

        Raises:
            UserError: the crop is larger than the resized image.
        """
        if resize < image_size:
            raise UserError(f"images resized to {resize} pixels are too small for crops of {image_size}")
        self._index = index
        self._sizes = (resize, image_size)
        self._device = device
        self.bad = BadSamples(index, device, on_corrupt, skipped)
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
            UserError: a file is bad and on_corrupt is `fail`.
        """
        todo = deque(self._rows)
        while todo:
            stream = self._open(list(todo))
            try:
                while todo:
                    rows = self._good(todo[0])
                    if rows:
                        try:
                            (images,) = next(stream)
                        except (BadFile, RuntimeError) as error:
                            stream.close()
                            self.bad.add_from(rows, error)
                            break
                        yield images.permute(0, 3, 1, 2), self._labels(rows)
                    todo.popleft()
            finally:
                stream.close()

    def _open(self, todo: Iterable[range]) -> Stream:
        requests = (
            Request([self._index.sample(i) for i in rows], self._inputs) for rows in map(self._good, todo) if rows
        )
        return Stream(self._build, requests, device=self._device, threads=self._threads, prefetch=self._prefetch)

    def _good(self, rows: range) -> list[int]:
        bad = set(self.bad.found)
        return [i for i in rows if i not in bad]

    def _labels(self, rows: list[int]) -> Tensor | None:
        return None if self._index.labels is None else self._index.labels[rows].to(self._device)

    def _inputs(self, sizes: Tensor) -> Arrays:
        return [evaluation_numbers(sizes, *self._sizes).numpy()]
