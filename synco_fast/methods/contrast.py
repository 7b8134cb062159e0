"""Momentum contrast: MoCo v2, MoCHi and SynCo differ only in the negatives they are given."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from synco_fast.models.queue import KeyQueue
from synco_fast.models.shuffle import KEY_SHUFFLES
from synco_fast.ops import HardNegatives, InfoNCE, infonce


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

    def forward(
        self,
        query_view: Tensor,
        key_view: Tensor,
        hard: HardNegatives,
        step: Tensor,
        row_offset: int,
        micro_batch: int = 0,
    ) -> Contrast:
        """Contrast two views of the same images (MoCo, Algorithm 1; SynCo, Algorithm 1).

        Args:
            query_view, key_view: (B, 3, H, W).
            hard: synthetic negatives of this step.
            step: int64 scalar tensor.
            row_offset: row of the first image in the global batch.
            micro_batch: number of this batch within the step.
        """
        q = F.normalize(self.query_encoder(query_view).float(), dim=1)
        with torch.no_grad():
            k = F.normalize(self.encode_keys(self.key_encoder, key_view, self.seed, step, micro_batch).float(), dim=1)
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
        )
        return Contrast(result, k)


def negatives_at(epoch: int, hard: HardNegatives, warmup_epochs: int) -> HardNegatives:
    """Synthetic negatives of an epoch: none before the warm-up is over (SynCo, section 4.1)."""
    return hard if epoch >= warmup_epochs else HardNegatives.none()
