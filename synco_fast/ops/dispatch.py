"""The table of backends: which can be used here, which of them fits a call, and which is the fastest."""

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from synco_fast.ops import compiled, triton_infonce
from synco_fast.ops.hard import HardNegatives

logger = logging.getLogger(__name__)

_STATUS: dict[str, Callable[[], str]] = {
    "reference": lambda: "ok",
    "eager": lambda: "ok",
    "cpu": compiled.cpu_status,
    "triton": triton_infonce.status,
    "cuda": compiled.cuda_status,
}
_OBJECTIONS: dict[str, Callable[[Tensor, HardNegatives, float], str | None]] = {
    "cpu": compiled.cpu_objection,
    "triton": triton_infonce.objection,
    "cuda": compiled.cuda_objection,
}
_FASTEST = {"cpu": ("cpu", "eager"), "cuda": ("cuda", "triton", "eager")}


def backends() -> dict[str, str]:
    """Each backend's name with "ok", or with the reason why it cannot be used here."""
    return {name: _state(name) for name in _STATUS}


@torch.compiler.assume_constant_result  # torch.compile asks at its own time, and need not look inside
def _state(name: str) -> str:
    return _STATUS[name]()


def choose(backend: str, queue: Tensor, hard: HardNegatives, temperature: float, labels: Tensor | None) -> str:
    """The backend to use for a call: the one that was named, or for "auto" the fastest that can take it.

    Raises:
        ValueError: there is no such backend, or the named one does not take these arguments.
        RuntimeError: the named backend cannot be used here.
    """
    if backend == "auto":
        return _automatic(queue, hard, temperature, labels)
    if not isinstance(backend, str) or backend not in _STATUS:
        raise ValueError(f"unknown backend {backend!r}: expected auto or one of {', '.join(_STATUS)}")
    state = _state(backend)
    if state != "ok":
        raise RuntimeError(f"backend {backend} cannot be used: {state}")
    objection = _objection(backend, queue, hard, temperature, labels)
    if objection:
        raise ValueError(f"backend {backend} does not take this call: {objection}; use eager")
    return backend


def _objection(name: str, queue: Tensor, hard: HardNegatives, temperature: float, labels: Tensor | None) -> str | None:
    """Why a usable backend does not take a call, or None."""
    if name not in _OBJECTIONS:
        return None
    if labels is not None:
        return "it has no class oracle (labels, queue_labels)"
    return _OBJECTIONS[name](queue, hard, temperature)


def _automatic(queue: Tensor, hard: HardNegatives, temperature: float, labels: Tensor | None) -> str:
    passed_over = ""
    for name in _FASTEST.get(queue.device.type, ("eager",)):
        state = _state(name)
        objection = state if state != "ok" else _objection(name, queue, hard, temperature, labels)
        if objection is None:
            if not torch.compiler.is_compiling():
                _log_once(queue.device.type, name, passed_over)
            return name
        passed_over += f"; not {name}: {objection}"
    raise AssertionError("eager takes every call")


@functools.cache
def _log_once(device_type: str, name: str, passed_over: str) -> None:
    logger.info("backend auto on %s: %s%s", device_type, name, passed_over)
