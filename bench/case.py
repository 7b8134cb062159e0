"""One thing to be timed, as data: which contender, on what sizes, with which negatives."""

import json
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from synco_fast.ops import HardNegatives

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """A contender at given sizes.

    Attributes:
        contender: a name in `bench.contenders.CONTENDERS`.
        setting: what `hard` is called in tables: moco, synco, mochi, or a kind alone.
        batch, queue, dim: B, K, D.
        hard: the negatives.
        temperature: t.
        dtype: of the queue, as this contender holds it. q and k are float32.
        device: cpu or cuda.
    """

    contender: str
    setting: str
    batch: int
    queue: int
    dim: int
    hard: HardNegatives
    temperature: float
    dtype: str
    device: str

    @property
    def element(self) -> int:
        """Bytes of one of the queue's elements."""
        return DTYPES[self.dtype].itemsize

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Case":
        values = json.loads(text)
        return cls(**{**values, "hard": HardNegatives(**values["hard"])})

    def small(self) -> "Case":
        """The same contender on a few rows: to load what it loads once."""
        return replace(self, batch=min(self.batch, 4), queue=min(self.queue, max(self.hard.n_hard, 1024)))


class Inputs(NamedTuple):
    """q (a leaf that takes a gradient) and k (B, D) in float32, and the queue (K, D): unit rows."""

    q: Tensor
    k: Tensor
    queue: Tensor


def inputs(case: Case) -> Inputs:
    """Random inputs, the same for every contender of these sizes; k is near q."""
    device = torch.device(case.device)
    generator = torch.Generator(device).manual_seed(0)

    def rows(n: int) -> Tensor:
        return F.normalize(torch.randn(n, case.dim, generator=generator, device=device), dim=1)

    q = rows(case.batch)
    k = F.normalize(q + 0.5 * rows(case.batch), dim=1)
    return Inputs(q.requires_grad_(), k, rows(case.queue).to(DTYPES[case.dtype]))
