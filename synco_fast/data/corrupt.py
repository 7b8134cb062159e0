"""What to do about bad files. A file is bad exactly if the loader cannot make a view of it: there is no other rule."""

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from synco_fast.data.numbers import evaluation_numbers
from synco_fast.data.pipeline import Arrays, evaluation_pipeline
from synco_fast.data.reader import BadFile, decoding_fault, read_image
from synco_fast.data.samples import Index
from synco_fast.errors import UserError

OnCorrupt = Literal["fail", "skip"]
_SIDE = 16  # pixels; how large the view is that is tried


@dataclass(frozen=True)
class Checked:
    """What trying to make a view of a file came to: why it cannot be made or None, and the format, where known."""

    fault: str | None
    format: str | None


class Checker:
    """Makes a small view of one sample at a time, with the loader's own reader and decoder.

    Args:
        index: of the samples. device: where the decoder runs.
    """

    def __init__(self, index: Index, device: torch.device) -> None:
        self._index = index
        self._device = device
        self._pipeline: Any = None
        self._inputs: Arrays = []

    def check(self, sample: int) -> Checked:
        """Try a sample.

        Raises:
            RuntimeError: DALI fails for another reason than this file.
        """
        try:
            data, header = read_image(self._index.sample(sample))
        except BadFile as error:
            return Checked(error.reason, None)
        sizes = torch.tensor([[header.height, header.width]])
        self._inputs[:] = [[data], evaluation_numbers(sizes, _SIDE, _SIDE).numpy()]
        try:
            self._pipeline = self._pipeline or self._build()
            self._pipeline.run()
        except RuntimeError as error:
            self._pipeline = None  # DALI is dead after an error
            if not blames_file(str(error)):
                raise
            return Checked(decoding_fault(data) or "cannot be decoded by DALI, though it can by PIL", header.format)
        return Checked(None, header.format)

    def _build(self) -> Any:
        inputs = self._inputs  # not self, so that the pipeline's threads end when the checker goes
        return evaluation_pipeline(
            lambda: inputs,
            batch_size=1,
            image_size=_SIDE,
            dtype=torch.float32,
            augmentation="auto",
            device=self._device,
            threads=1,
            prefetch=1,
        )


def blames_file(message: str) -> bool:
    """Whether a pipeline's error is about the image it decodes. Paths in it, which may hold any word, do not count."""
    reason = message.rpartition("encountered:")[2]
    return re.search(r"operator `[\w.]*\bdecoders\b", message) is not None and "alloc" not in reason.lower()


class BadSamples:
    """The samples of an index found bad so far, and what to do about the next.

    Attributes:
        found: their numbers, in the order found.
        on_skip: called with a line of text for each one that is skipped.
    """

    def __init__(self, index: Index, device: torch.device, on_corrupt: OnCorrupt, found: Sequence[int]) -> None:
        self.found = list(found)
        self.on_skip: Callable[[str], object] = partial(print, file=sys.stderr, flush=True)
        self._index, self._device, self._on_corrupt = index, device, on_corrupt

    def add_from(self, samples: Sequence[int], error: Exception) -> None:
        """Find and note the bad ones among the samples of a batch that failed with an error; say which.

        Raises:
            UserError: on_corrupt is `fail`; it names the first of them.
            Exception: the error itself, when it is none of these files' fault.
        """
        checker = Checker(self._index, self._device)
        checked = ((sample, checker.check(sample).fault) for sample in samples)
        bad = [(sample, fault) for sample, fault in checked if fault is not None]
        if not bad:
            raise error
        if self._on_corrupt == "fail":
            raise self._failure(*bad[0], others=len(bad) - 1) from error
        for sample, fault in bad:
            self.found.append(sample)
            self.on_skip(f"skipping image file {self._index.sample(sample)}: it {fault}")

    def _failure(self, sample: int, fault: str, others: int) -> UserError:
        more = f" (and {others} more of its batch)" if others else ""
        return UserError(
            f"image file {self._index.sample(sample)} {fault}{more}; replace or remove it, list all such files with "
            f"`synco-fast data verify`, or pretrain without them (data.on_corrupt=skip)"
        )
