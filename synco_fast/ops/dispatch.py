"""The table of backends: which can be used here, which of them fits a call, and which is the fastest."""

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from synco_fast.ops import compiled

logger = logging.getLogger(__name__)

_STATUS: dict[str, Callable[[], str]] = {
    "reference": lambda: "ok",
    "eager": lambda: "ok",
    "cpu": compiled.cpu_status,
    "triton": lambda: "not in this version: the Triton kernels are still to be written; use eager",
    "cuda": compiled.cuda_status,
}
_DEVICE = {"cpu": "cpu", "cuda": "cuda"}
_FASTEST = {"cpu": ("cpu", "eager"), "cuda": ("cuda", "triton", "eager")}
_FUSED = ("cpu", "triton", "cuda")
_QUEUE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MIN_TEMPERATURE = 0.02
"""The fused backends take exp(s / t) as it is, without a maximum to subtract: it stays within float32 down to here."""


def backends() -> dict[str, str]:
    """Each backend's name with "ok", or with the reason why it cannot be used here."""
    return {name: _state(name) for name in _STATUS}


@torch.compiler.assume_constant_result  # torch.compile asks at its own time, and need not look inside
def _state(name: str) -> str:
    return _STATUS[name]()


def choose(backend: str, queue: Tensor, temperature: float, labels: Tensor | None) -> str:
    """The backend to use for a call: the one that was named, or for "auto" the fastest that can take it.

    Raises:
        ValueError: there is no such backend, or the named one does not take these arguments.
        RuntimeError: the named backend cannot be used here.
    """
    if backend == "auto":
        return _automatic(queue, temperature, labels)
    if backend not in _STATUS:
        raise ValueError(f"unknown backend {backend!r}: expected auto or one of {', '.join(_STATUS)}")
    state = _state(backend)
    if state != "ok":
        raise RuntimeError(f"backend {backend} cannot be used: {state}")
    objection = _objection(backend, queue, temperature, labels)
    if objection:
        raise ValueError(f"backend {backend} does not take this call: {objection}; use eager")
    return backend


def _objection(backend: str, queue: Tensor, temperature: float, labels: Tensor | None) -> str | None:
    """Why a usable backend does not take a call, or None."""
    if backend in _DEVICE and queue.device.type != _DEVICE[backend]:
        return f"it needs tensors on a {_DEVICE[backend]} device, got {queue.device}"
    if backend not in _FUSED:
        return None
    if queue.dtype not in _QUEUE_DTYPES:
        return f"its queue is float16, bfloat16 or float32, got {queue.dtype}"
    if temperature < MIN_TEMPERATURE:
        return f"its temperature is at least {MIN_TEMPERATURE}, got {temperature}"
    if labels is not None:
        return "it has no class oracle (labels, queue_labels)"
    return None


def _automatic(queue: Tensor, temperature: float, labels: Tensor | None) -> str:
    for name in _FASTEST.get(queue.device.type, ("eager",)):
        if _state(name) == "ok" and _objection(name, queue, temperature, labels) is None:
            if not torch.compiler.is_compiling():
                _log_once(queue.device.type, name)
            return name
    raise AssertionError("eager takes every call")


@functools.cache
def _log_once(device_type: str, name: str) -> None:
    logger.info("backend auto on %s: %s", device_type, name)
