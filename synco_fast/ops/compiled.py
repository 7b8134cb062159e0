"""The `cpu` and `cuda` backends: the compiled library of kernels/, if there is one, and why it cannot be used."""

import functools
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

from synco_fast.ops.hard import HardNegatives, pack
from synco_fast.ops.numbers import MIN_TEMPERATURE

LIBRARY = Path(__file__).parent.parent / f"_kernels{sysconfig.get_config_var('EXT_SUFFIX')}"

CUDA_DIMS = (64, 128, 256)
MAX_QUEUE_ROWS = 2**20
MAX_N_HARD = 4096

_HOW = "pip install --no-build-isolation -e . (or make clean setup) builds it"


@functools.cache
def _load() -> str:
    """Load the library; "ok", or what is wrong with it."""
    if not LIBRARY.exists():
        return f"the kernels are not compiled: with a C++ compiler (g++) installed, {_HOW}"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"{LIBRARY.name} does not fit this torch {torch.__version__}; {_HOW} anew ({str(error)[:200]})"
    if not hasattr(torch.ops.synco_fast, "record_phases"):
        return f"{LIBRARY.name} was built from older sources; {_HOW} anew"
    return "ok"


def cpu_status() -> str:
    """ "ok", or why the `cpu` backend cannot be used here."""
    return _load()


def cuda_status() -> str:
    """ "ok", or why the `cuda` backend cannot be used here."""
    state = _load()
    if state != "ok":
        return state
    if not torch.ops.synco_fast.compiled_with_cuda():
        return f"the kernels were compiled without nvcc: with the CUDA toolkit of torch's version, {_HOW}"
    if not torch.cuda.is_available():
        return "no CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        return "it needs a GPU of compute capability 8.0 or later"
    return "ok"


def cpu_objection(queue: Tensor, hard: HardNegatives, temperature: float) -> str | None:
    """Why the `cpu` backend, where it can be used, does not take a call; None if it does."""
    if queue.device.type != "cpu":
        return f"it needs tensors on the CPU, got {queue.device}"
    if queue.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"queue must be float16, bfloat16 or float32, got {queue.dtype}"
    return _temperature_objection(temperature)


def cuda_objection(queue: Tensor, hard: HardNegatives, temperature: float) -> str | None:
    """Why the `cuda` backend, where it can be used, does not take a call; None if it does."""
    if queue.device.type != "cuda":
        return f"it needs tensors on a CUDA device, got {queue.device}"
    if queue.dtype != torch.float16:
        return f"queue must be float16, got {queue.dtype}"
    if queue.shape[1] not in CUDA_DIMS:
        return f"queue must have {', '.join(map(str, CUDA_DIMS))} columns, got {queue.shape[1]}"
    if len(queue) > MAX_QUEUE_ROWS:
        return f"queue must have at most {MAX_QUEUE_ROWS} rows, got {len(queue)}"
    if hard.n_hard > MAX_N_HARD:
        return f"n_hard must be at most {MAX_N_HARD}, got {hard.n_hard}"
    return _temperature_objection(temperature)


def _temperature_objection(temperature: float) -> str | None:
    return (
        None if temperature >= MIN_TEMPERATURE else f"temperature must be at least {MIN_TEMPERATURE}, got {temperature}"
    )


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
