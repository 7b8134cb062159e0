"""The `cpu` and `cuda` backends: the compiled library of kernels/, if there is one, and why it cannot be used."""

import functools
from pathlib import Path

import torch
from torch import Tensor

from synco_fast.ops.hard import HardNegatives, pack

_HOW = "pip install --no-build-isolation -e . (or make setup) builds it"


@functools.cache
def _load() -> str:
    """Load the library; "ok", or what is wrong with it."""
    found = sorted(Path(__file__).parent.parent.glob("_kernels*.so"))
    if not found:
        return f"the kernels are not compiled: with a C++ compiler (g++) installed, {_HOW}"
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        return f"{found[0].name} does not fit this torch {torch.__version__}; {_HOW} anew ({str(error)[:200]})"
    return "ok"


def cpu_status() -> str:
    """ "ok", or why the `cpu` backend cannot be used here."""
    return _load()


def cuda_status() -> str:
    """ "ok", or why the `cuda` backend cannot be used here."""
    state = _load()
    if state != "ok":
        return state
    return "not in this version: the CUDA kernel is still to be written; use triton or eager"


def infonce(
    q: Tensor,
    k: Tensor,
    queue: Tensor,
    hard: HardNegatives,
    temperature: float,
    seed: int,
    step: Tensor,
    row_offset: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, its gradient with respect to q, rank, rank_all and statistics. Arguments as in the op."""
    _load()  # a graph captured by torch.compile may call this first
    counts, strengths, extrapolate_from = pack(hard)
    return torch.ops.synco_fast.infonce_compiled(
        q, k, queue, step, counts, strengths, extrapolate_from == "negative", temperature, seed, row_offset
    )
