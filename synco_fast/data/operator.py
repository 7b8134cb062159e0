"""The augmentation operator as a node of a DALI pipeline: compiled, or in plain torch with the same output bits."""

import functools
import logging
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import dlpack

from synco_fast.data.plain_view import make_view
from synco_fast.errors import UserError

LIBRARY = Path(__file__).parent.parent / f"_augment{sysconfig.get_config_var('EXT_SUFFIX')}"

_HOW = "pip install --no-build-isolation -e . (or make clean setup) builds it"

Augmentation = Literal["auto", "compiled", "plain"]
Node = Callable[[Any, Any], Any]  # from DALI's decoded images and their numbers to views


def dali() -> tuple[ModuleType, ModuleType, Any]:
    """DALI's `fn`, `types` and `pipeline_def`.

    Raises:
        UserError: DALI is not installed or cannot be loaded.
    """
    try:
        from nvidia.dali import fn, types
        from nvidia.dali.pipeline import pipeline_def
    except ImportError as error:
        raise UserError(
            f"NVIDIA DALI, which loads the images, cannot be imported ({error}); install the cuda12 or the "
            "cuda13 extra, never both: pip install -e .[cuda12]  (it also runs on machines without a GPU)"
        ) from error
    return fn, types, pipeline_def


def status(device: torch.device) -> str:
    """ "ok", or why the compiled operator cannot be used on a device.

    Raises:
        UserError: as `dali`.
    """
    state = _load()
    if state != "ok" or device.type == "cpu":
        return state
    if "SyncoView" not in _backend().RegisteredGPUOps():
        return f"the augmentation was compiled without nvcc: with the CUDA toolkit of torch's version, {_HOW}"
    return "ok"


def resolve(augmentation: Augmentation, device: torch.device) -> Literal["compiled", "plain"]:
    """What `auto` comes to on a device.

    Raises:
        UserError: compiled was asked for, and cannot be used.
    """
    state = status(device)
    if augmentation == "compiled" and state != "ok":
        raise UserError(f"data.augmentation = compiled: cannot be used here: {state}")
    if augmentation != "auto":
        return augmentation
    if state != "ok":
        _warn_once(state)
    return "compiled" if state == "ok" else "plain"


def view_operator(
    augmentation: Augmentation, device: torch.device, *, size: int, values: Tensor, dtype: torch.dtype
) -> Node:
    """What turns decoded images and rows of numbers, which are on the CPU, into (size, size, 3) views.

    Args:
        augmentation: see `resolve`.
        device: of images and views.
        size: height and width of a view, pixels.
        values: a `value_table`.
        dtype: of the views, torch.float32 or torch.float16.
    """
    fn, types, _ = dali()
    if resolve(augmentation, device) == "compiled":
        return lambda images, numbers: fn.synco_view(
            images,
            numbers=numbers,
            size=size,
            values=values.flatten().tolist(),
            dtype={torch.float32: types.FLOAT, torch.float16: types.FLOAT16}[dtype],
        )
    make = functools.partial(
        fn.dl_tensor_python_function,
        function=functools.partial(_plain, size, values.to(device, dtype)),
        batch_processing=False,
    )
    if device.type == "cpu":
        return make
    return lambda images, numbers: make(images, numbers.gpu(), device="gpu")


@functools.cache
def _warn_once(state: str) -> None:
    logging.getLogger(__name__).warning("data.augmentation = auto: plain torch makes the views, slowly: %s", state)


def _plain(size: int, values: Tensor, image: Any, numbers: Any) -> Any:
    view = make_view(dlpack.from_dlpack(image), dlpack.from_dlpack(numbers).cpu(), size, values)
    if view.is_cuda:
        torch.cuda.current_stream(view.device).synchronize()  # DALI reads it on a stream of its own
    return view.__dlpack__()


def _backend() -> Any:
    from nvidia.dali import backend

    return backend


@functools.cache
def _load() -> str:
    """Register the compiled operator with DALI; "ok", or what is wrong with it."""
    dali()  # or the error that says how to get it
    import nvidia.dali
    from nvidia.dali import plugin_manager

    if not LIBRARY.exists():
        return f"the augmentation is not compiled: with a C++ compiler (g++) and DALI installed, {_HOW}"
    # Asked of the file, as loading it into another DALI can crash the process.
    if f"built for DALI {nvidia.dali.__version__}\0".encode() not in LIBRARY.read_bytes():
        return f"{LIBRARY.name} was not built for this DALI {nvidia.dali.__version__}; {_HOW} anew"
    try:
        plugin_manager.load_library(str(LIBRARY))
    except RuntimeError as error:
        return f"{LIBRARY.name} cannot be loaded; {_HOW} anew ({str(error)[:200]})"
    return "ok"
