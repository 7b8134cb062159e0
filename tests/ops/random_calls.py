"""Random calls of the op, for hypothesis: what the fused backends are compared on."""

import os
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from synco_fast.ops import KINDS, HardNegatives
from tests.ops.cases import grid_rows, near

FULL = "SYNCO_FAST_CASES" in os.environ
"""`make stress` sets it to its number of cases; sizes are not reduced then, and each run draws others by its seed."""


def cases(reduced: int) -> int:
    """How many to run, `reduced` in `make test`."""
    return int(os.environ.get("SYNCO_FAST_CASES", reduced))


@dataclass(frozen=True)
class Case:
    """One random call."""

    batch: int
    queue_rows: int
    dim: int
    hard: HardNegatives
    temperature: float
    q_dtype: torch.dtype
    k_dtype: torch.dtype
    queue_dtype: torch.dtype
    seed: int

    @property
    def arguments(self) -> dict[str, object]:
        """All but the tensors."""
        place = {"seed": self.seed, "step": self.seed % 1000, "row_offset": self.seed % 77}
        return {"hard": self.hard, "temperature": self.temperature, **place}

    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and the queue on the grid: no hard set hangs on a rounding, and a single wrong parent shows."""
        bits = 8 if torch.bfloat16 in (self.q_dtype, self.k_dtype, self.queue_dtype) else 11
        q, queue = (
            grid_rows(rows, self.dim, self.seed + i, bits) for i, rows in enumerate((self.batch, self.queue_rows))
        )
        return q.to(self.q_dtype), near(q, self.seed + 2, bits).to(self.k_dtype), queue.to(self.queue_dtype)


def whole(low: int, high: int) -> st.SearchStrategy[int]:
    """Whole numbers, small ones as likely as large ones: those of 3 bits, say, as those of 9."""
    lengths = st.integers(low.bit_length(), high.bit_length())
    return lengths.flatmap(lambda bits: st.integers(max(low, 2**bits // 2), min(high, 2**bits - 1)))


dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


@st.composite
def calls(
    draw: st.DrawFn,
    *,
    queue_rows: int = 20_000,
    queue_dtypes: st.SearchStrategy[torch.dtype] = dtypes,
    room: int = 2**40,
    synthetic: int = 1,
) -> Case:
    """Of all sizes up to the largest; those of a backend that runs slowly, with less work to each.

    Args:
        queue_rows: the most rows of the queue.
        queue_dtypes: those that the backend takes.
        room: bound on a call's work, B D (K + synthetic * synthetic negatives), unless a single query is more already.
            Of a kind at least 64 are counted: so many or so are made at a time.
        synthetic: cost of a synthetic negative in rows of the queue.
    """
    dim = draw(st.sampled_from([64, 128, 256]))
    rows = draw(whole(256, queue_rows))
    most = draw(whole(0, min(512, room // (len(KINDS) * synthetic * dim))))
    hard = HardNegatives(
        draw(whole(1, min(4096, rows)) | st.just(min(4096, rows))),
        **{kind: draw(whole(0, most)) for kind in KINDS},
        sigma=draw(st.sampled_from([0.01, 0.3])),
        extrapolate_from=draw(st.sampled_from(["query", "negative"])),
    )
    hard = hard if hard.total else HardNegatives.none()
    made = sum(max(64, hard.count(kind)) for kind in hard.kinds)
    return Case(
        batch=draw(whole(1, max(1, min(300, room // (dim * (rows + synthetic * made)))))),
        queue_rows=rows,
        dim=dim,
        hard=hard,
        temperature=draw(st.floats(0.02, 1.0)),
        q_dtype=draw(dtypes),
        k_dtype=draw(dtypes),
        queue_dtype=draw(queue_dtypes),
        seed=draw(st.integers(0, 2**40)),
    )
