"""Runs a DALI pipeline ahead of its consumer: a thread pool reads files, DALI decodes, torch gets the result.

Three stages overlap: `prefetch` batches of files being read, `prefetch` batches inside DALI, and the
consumer's own. Errors come out of `__next__` at the batch they belong to, after the batches before it, and end the
stream.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from synco_fast.data.pipeline import Arrays, Source
from synco_fast.data.reader import Header, read_image
from synco_fast.data.samples import Sample, close_shards

Image = tuple[np.ndarray, Header]


@dataclass(frozen=True, eq=False)
class Request:
    """One batch to make.

    Attributes:
        samples: its B images, in row order.
        inputs: from (B, 2) int64 heights and widths to the pipeline inputs that follow the encoded images.
    """

    samples: list[Sample]
    inputs: Callable[[Tensor], Arrays]


class Stream:
    """Iterator over a pipeline's outputs, one tuple of tensors per request, in order."""

    def __init__(
        self,
        build: Callable[[Source], Any],
        requests: Iterator[Request],
        *,
        device: torch.device,
        threads: int,
        prefetch: int,
    ) -> None:
        """Start reading.

        Args:
            build: makes the pipeline from the source it is to call.
            requests: batches to make; may be endless.
            device: where the pipeline's outputs live.
            threads: file-reading threads.
            prefetch: batches read ahead of DALI.
        """
        self._device = device
        self._threads = threads
        self._requests = requests
        self._failure: BaseException | None = None
        self._running: deque[Request] = deque()
        self._reading: deque[tuple[Request, Future[Arrays]]] = deque()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="synco-reader")
        self._pipeline = build(self._feed)
        self._read_ahead(prefetch)
        self._scheduled = False

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> tuple[Tensor, ...]:
        """The next batch's outputs; they stay valid for as long as the caller holds them.

        Raises:
            BadFile: a file of this batch cannot be read.
            RuntimeError: DALI has failed, mostly on a file of this batch that cannot be decoded.
            StopIteration: no more requests.
        """
        try:
            return self._advance()
        except StopIteration:
            raise
        except BaseException as error:
            # DALI is dead after an error, and after an interrupt the place is unknown: never go on from here.
            self._failure = error
            self._running.clear()
            raise

    def close(self) -> None:
        """Stop the threads; batches already handed out stay valid."""
        self._pool.shutdown(cancel_futures=True)
        # An error's traceback holds the pipeline, whose threads end when it goes.
        self._pipeline = self._failure = None
        close_shards()

    def _advance(self) -> tuple[Tensor, ...]:
        if not self._scheduled:
            self._scheduled = True
            self._pipeline.schedule_run()  # the first call fills DALI's queue
        if self._failure is not None and not self._running:
            raise self._failure
        outputs = self._outputs()
        self._running.popleft()
        # Scheduled before this batch is consumed, so that DALI never waits for the training step.
        self._pipeline.schedule_run()
        return outputs

    def _outputs(self) -> tuple[Tensor, ...]:
        # On a GPU the outputs are ordered on torch's stream, without the host waiting. Memory goes back to DALI when
        # torch drops it; that DALI waits for the device's pending work before using it again is read from its source
        # and not yet tested on a GPU.
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        batches = self._pipeline.share_outputs(stream)
        outputs = tuple(from_dlpack(batch.as_tensor()) for batch in batches)
        self._pipeline.release_outputs()
        return outputs

    def _feed(self) -> Arrays:
        """DALI's source: the inputs of the next batch to schedule."""
        if not self._reading:
            raise StopIteration
        request, reading = self._reading.popleft()
        # Not raised here: `reading` holds the error, whose traceback would hold this frame and so DALI's pipeline.
        error = reading.exception()
        if error is not None:
            self._failure = error  # raised by __next__ once the batches before it are out
            self._reading.clear()
            raise StopIteration
        arrays = reading.result()
        self._running.append(request)
        self._read_ahead(1)
        return arrays

    def _read_ahead(self, batches: int) -> None:
        for request in islice(self._requests, batches):
            parts = [self._pool.submit(read_all, request.samples[i :: self._threads]) for i in range(self._threads)]
            # The pool is first in, first out, so the parts are under way before this waits for them.
            self._reading.append((request, self._pool.submit(_assemble, request, parts)))


def read_all(samples: list[Sample]) -> list[Image]:
    return [read_image(sample) for sample in samples]


def _assemble(request: Request, parts: list[Future[list[Image]]]) -> Arrays:
    images: dict[int, Image] = {}
    for i, part in enumerate(parts):
        images.update(zip(range(i, len(request.samples), len(parts)), part.result(), strict=True))
    rows = [images[row] for row in range(len(request.samples))]
    sizes = torch.tensor([(header.height, header.width) for _, header in rows])
    return [[data for data, _ in rows], *request.inputs(sizes)]
