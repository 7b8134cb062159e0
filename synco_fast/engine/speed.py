"""How a step is computed: `speed` of the configuration, made definite for a device."""

import importlib.util
import os
import shlex
import shutil
from dataclasses import dataclass

import torch

from synco_fast.config import Config
from synco_fast.engine.distributed import Processes
from synco_fast.errors import UserError
from synco_fast.machine import apex_status
from synco_fast.methods import MomentumContrast
from synco_fast.models.encoders import low_precision_copy, recompute_activations


@dataclass(frozen=True)
class Speed:
    """The section `speed` with every `auto` decided."""

    channels_last: bool
    compile: bool
    cuda_graph: bool
    key_stream: bool
    key_twin: bool
    recompute: bool
    apex: bool


def resolve(config: Config, processes: Processes) -> Speed:
    """Decide what is `auto`: on where it is the faster by what was measured on such a device (docs/performance.md).

    Raises:
        UserError: something that was asked for cannot work here.
    """
    speed, cuda = config.speed, processes.device.type == "cuda"
    for key in ("cuda_graph", "key_stream"):
        if getattr(speed, key) is True and not cuda:
            raise UserError(f"speed.{key} = true: needs a GPU, and this run is on {processes.device.type}")
    if speed.cuda_graph is True and processes.world_size > 1:
        raise UserError(f"speed.cuda_graph = true: is for one process, and this run has {processes.world_size}")
    if speed.compile is True:
        _check_compiler(cuda)
    if speed.optimizer == "apex":
        _check_apex(cuda)
    return Speed(
        channels_last=speed.channels_last,
        compile=speed.compile is True or (speed.compile == "auto" and cuda and not speed.recompute and _has_triton()),
        cuda_graph=speed.cuda_graph is True,
        key_stream=speed.key_stream is True,
        key_twin=speed.key_twin is True,
        recompute=speed.recompute,
        apex=speed.optimizer == "apex",
    )


def apply(speed: Speed, contrast: MomentumContrast) -> MomentumContrast:
    """The model on its device, made to compute that way. Its state stays what it is."""
    contrast.to(memory_format=torch.channels_last if speed.channels_last else torch.contiguous_format)
    if speed.key_twin:
        contrast.use_key_twin(low_precision_copy(contrast.key_encoder))
    if speed.recompute:
        recompute_activations(contrast.query_encoder)
    if speed.compile:
        for encoder in (contrast.query_encoder, contrast.key_twin or contrast.key_encoder):
            encoder.compile(dynamic=False)
    if speed.key_stream:
        contrast.key_stream = torch.cuda.Stream()
    return contrast


def _check_compiler(cuda: bool) -> None:
    if cuda and not _has_triton():
        raise UserError("speed.compile = true: on a GPU it needs Triton: pip install triton")
    compiler = (shlex.split(os.environ.get("CXX", "")) or ["g++"])[0]
    if not cuda and shutil.which(compiler) is None:
        raise UserError(f"speed.compile = true: on a CPU it needs a C++ compiler, and there is no {compiler}")


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _check_apex(cuda: bool) -> None:
    status = apex_status() if cuda else "it needs a GPU"
    if status != "ok":
        raise UserError(f"speed.optimizer = apex: cannot be used here: {status}")


def choose_algorithms(device: torch.device, deterministic: bool) -> None:
    """On a GPU, have cuDNN try which of its algorithms are the fastest; or have everything compute the same bits each
    time, as a CPU does anyway, where an operation that cannot raises when it is called.
    """
    if device.type != "cuda":
        return
    torch.backends.cudnn.benchmark = not deterministic
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        from torch._inductor import config as inductor

        inductor.deterministic = True  # no choice by timing
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
