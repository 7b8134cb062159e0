"""Momentum contrast: MoCo v2, MoCHi and SynCo differ only in the negatives they are given."""

import contextlib
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from synco_fast.models.encoders import momentum_update
from synco_fast.models.queue import KeyQueue
from synco_fast.models.shuffle import KEY_SHUFFLES
from synco_fast.ops import HardNegatives, InfoNCE, infonce
from synco_fast.stages import stage


class Contrast(NamedTuple):
    """What one batch gives: the op's result, and the keys (B, D) to be enqueued."""

    result: InfoNCE
    keys: Tensor


class MomentumContrast(nn.Module):
    """A query encoder that learns, a key encoder that follows it, and a queue of past keys.

    Args:
        query_encoder, key_encoder: images (B, 3, H, W) to (B, D); the key encoder starts as a copy and is not trained.
        queue: past keys.
        temperature: t.
        seed: of the synthetic negatives and the shuffles.
        batch_norm: mode of `bn`, which says how keys are shuffled.
        backend: of the op.

    Attributes:
        key_twin: what keys are computed with in place of the key encoder, if anything: its low-precision copy.
        key_stream: the CUDA stream they are computed on, beside the queries; None: after them.
    """

    def __init__(
        self,
        query_encoder: nn.Module,
        key_encoder: nn.Module,
        queue: KeyQueue,
        *,
        temperature: float,
        seed: int,
        batch_norm: str,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.query_encoder = query_encoder
        self.key_encoder = key_encoder.requires_grad_(False)
        self.queue = queue
        self.temperature = temperature
        self.seed = seed
        self.encode_keys = KEY_SHUFFLES[batch_norm]
        self.backend = backend
        self.key_encoder.load_state_dict(self.query_encoder.state_dict())
        self.key_stream: torch.cuda.Stream | None = None
        self._key_twin: list[nn.Module] = []  # in a list, so that it is no part of this module's state

    @property
    def key_twin(self) -> nn.Module | None:
        return self._key_twin[0] if self._key_twin else None

    def use_key_twin(self, twin: nn.Module) -> None:
        self._key_twin = [twin]

    def update_keys(self, momentum: float) -> None:
        """Have the key encoder follow the query encoder."""
        momentum_update(self.key_encoder, self.query_encoder, momentum, self.key_twin)

    def forward(
        self,
        query_view: Tensor,
        key_view: Tensor,
        hard: HardNegatives,
        step: Tensor,
        row_offset: int,
        micro_batch: int = 0,
        labels: Tensor | None = None,
    ) -> Contrast:
        """Contrast two views of the same images (MoCo, Algorithm 1; SynCo, Algorithm 1).

        Args:
            query_view, key_view: (B, 3, H, W).
            hard: synthetic negatives of this step.
            step: int64 scalar tensor.
            row_offset: row of the first image in the global batch.
            micro_batch: number of this batch within the step.
            labels: (B,) int64 classes of the images, for the class oracle (MoCHi, arXiv 2010.01028); needs a labelled
                queue. None: no oracle.
        """
        with self._beside(), stage("key forward"), torch.no_grad():
            encoder = self.key_twin or self.key_encoder
            k = F.normalize(self.encode_keys(encoder, key_view, self.seed, step, micro_batch).float(), dim=1)
        with stage("query forward"):
            q = F.normalize(self.query_encoder(query_view).float(), dim=1)
        if self.key_stream is not None:
            torch.cuda.current_stream().wait_stream(self.key_stream)
            k.record_stream(torch.cuda.current_stream())
        with stage("op"):
            result = infonce(
                q,
                k,
                self.queue.rows,
                hard=hard,
                temperature=self.temperature,
                seed=self.seed,
                step=step,
                row_offset=row_offset,
                backend=self.backend,
                labels=labels,
                queue_labels=None if labels is None else self.queue.labels,
            )
        return Contrast(result, k)

    def _beside(self) -> AbstractContextManager[Any]:
        """What happens within is on the key stream, after all that came before it."""
        if self.key_stream is None:
            return contextlib.nullcontext()
        self.key_stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self.key_stream)


def negatives_at(epoch: int, hard: HardNegatives, warmup_epochs: int) -> HardNegatives:
    """Synthetic negatives of an epoch: none before the warm-up is over (SynCo, section 4.1)."""
    return hard if epoch >= warmup_epochs else HardNegatives.none()
