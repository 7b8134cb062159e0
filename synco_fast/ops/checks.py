"""The op's boundary: each error names the argument, what was expected and what came."""

import math
import os

import torch
from torch import Tensor

from synco_fast.ops.hard import HardNegatives

DEBUG = os.environ.get("SYNCO_FAST_DEBUG") == "1"
"""Also look at values: rows that are NaN or not of unit length are refused. It reads the device at every call."""

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Rounding a unit row to float16 or bfloat16 moves its squared length by up to 3e-4 or 2.6e-3; some 6 times that is an
# error. Wider dtypes get float16's bound: what comes from a normalisation in float16 is a unit row still.
_UNIT_TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 2e-3, torch.float64: 2e-3}


def tensors(
    q: Tensor, k: Tensor, queue: Tensor, hard: HardNegatives, labels: Tensor | None, queue_labels: Tensor | None
) -> None:
    """Refuse shapes, dtypes and devices that do not fit."""
    if not isinstance(hard, HardNegatives):
        raise TypeError(f"hard must be HardNegatives, got {hard!r}")
    for name, tensor in (("q", q), ("k", k), ("queue", queue)):
        _dense(name, tensor)
        if tensor.dim() != 2:
            raise ValueError(f"{name} must have 2 dimensions (rows, D), got shape {tuple(tensor.shape)}")
        if tensor.dtype not in _FLOATS:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
        if 0 in tensor.shape:
            raise ValueError(f"{name} must have at least one row and one column, got shape {tuple(tensor.shape)}")
        _same_device(name, tensor, q)
    if k.shape != q.shape:
        raise ValueError(f"k must have q's shape {tuple(q.shape)}, got {tuple(k.shape)}")
    if queue.shape[1] != q.shape[1]:
        raise ValueError(f"queue must have q's {q.shape[1]} columns, got shape {tuple(queue.shape)}")
    if hard.n_hard > len(queue):
        raise ValueError(f"n_hard must be at most the queue's {len(queue)} rows, got {hard.n_hard}")
    if (labels is None) != (queue_labels is None):
        raise ValueError("labels and queue_labels go together: got one without the other")
    if labels is not None and queue_labels is not None:
        _label_vector("labels", labels, q)
        _label_vector("queue_labels", queue_labels, queue)
    if DEBUG:
        for name, tensor in (("q", q), ("k", k), ("queue", queue)):
            _unit_rows(name, tensor)


def arguments(temperature: float, seed: int, row_offset: int) -> None:
    """Refuse scalars outside their range."""
    if not isinstance(temperature, (int, float)):
        raise TypeError(f"temperature must be a number, got {temperature!r}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be > 0 and finite, got {temperature}")
    for name, value in (("seed", seed), ("row_offset", row_offset)):
        if not isinstance(value, int):
            raise TypeError(f"{name} must be a whole number, got {value!r}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must lie in [0, 2^63), got {seed}")
    if not 0 <= row_offset < 2**32:
        raise ValueError(f"row_offset must lie in [0, 2^32), got {row_offset}")


def step_tensor(step: int | Tensor, q: Tensor) -> Tensor:
    """The step as an int64 scalar tensor on q's device."""
    if isinstance(step, int):
        if not 0 <= step < 2**63:
            raise ValueError(f"step must lie in [0, 2^63), got {step}")
        return torch.full((), step, dtype=torch.int64, device=q.device)
    if not isinstance(step, Tensor):
        raise TypeError(f"step must be an int or an int64 scalar tensor, got {step!r}")
    if step.dtype != torch.int64 or step.numel() != 1:
        raise TypeError(f"step must be an int or an int64 scalar tensor, got {step.dtype} {tuple(step.shape)}")
    _same_device("step", step, q)
    return step.reshape(())


def enqueue(queue: Tensor, pointer: Tensor, k: Tensor) -> None:
    """Refuse an enqueue that does not fit."""
    for name, tensor in (("queue", queue), ("pointer", pointer), ("k", k)):
        _dense(name, tensor)
    if k.dim() != 2 or queue.dim() != 2 or k.shape[1] != queue.shape[1]:
        raise ValueError(
            f"k must have shape (B, D) with the queue's D; got k {tuple(k.shape)}, queue {tuple(queue.shape)}"
        )
    if len(k) > len(queue):
        raise ValueError(f"k must have at most the queue's {len(queue)} rows, got {len(k)}")
    for name, tensor in (("queue", queue), ("k", k)):
        if tensor.dtype not in _FLOATS:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
    if pointer.dtype != torch.int64 or pointer.dim() > 1 or pointer.numel() != 1:
        raise TypeError(f"pointer must be an int64 scalar tensor, got {pointer.dtype} {tuple(pointer.shape)}")
    _same_device("pointer", pointer, queue, "queue")
    _same_device("k", k, queue, "queue")


def _dense(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be dense, got {tensor.layout}")


def _same_device(name: str, tensor: Tensor, other: Tensor, whose: str = "q") -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name} must be on {whose}'s device {other.device}, got {tensor.device}")


def _label_vector(name: str, labels: Tensor, rows: Tensor) -> None:
    _dense(name, labels)
    if labels.dtype != torch.int64 or labels.shape != rows.shape[:1]:
        raise ValueError(f"{name} must be int64 of shape ({len(rows)},), got {labels.dtype} {tuple(labels.shape)}")
    _same_device(name, labels, rows)


def _unit_rows(name: str, tensor: Tensor) -> None:
    off = (tensor.detach().double().square().sum(dim=1) - 1).abs()
    bad = ~(off <= _UNIT_TOLERANCE[tensor.dtype])
    if bad.any():
        row = int(bad.nonzero()[0])
        length = float(tensor[row].detach().double().norm())
        raise ValueError(f"{name} must have unit rows: row {row} has length {length:.6g}")
