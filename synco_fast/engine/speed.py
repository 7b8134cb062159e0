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
from synco_fast.ops.checks import DEBUG


@dataclass(frozen=True)
class Speed:
    """The section `speed` with `auto` decided."""

    channels_last: bool
    compile: bool
    cuda_graph: bool
    key_stream: bool
    key_twin: bool
    recompute: bool
    apex: bool


def resolve(config: Config, processes: Processes) -> Speed:
    """Decide what is `auto`.

    Raises:
        UserError: something that was asked for cannot work here.
    """
    speed, cuda = config.speed, processes.device.type == "cuda"
    for key in ("cuda_graph", "key_stream"):
        if getattr(speed, key) and not cuda:
            raise UserError(f"speed.{key} = true: needs a GPU, and this run is on {processes.device.type}")
    if speed.cuda_graph and processes.world_size > 1:
        raise UserError(f"speed.cuda_graph = true: is for one process, and this run has {processes.world_size}")
    if speed.cuda_graph and DEBUG:
        raise UserError("speed.cuda_graph = true: SYNCO_FAST_DEBUG=1 looks at rows at each step, which a graph cannot")
    obstacle = _compiler_obstacle(cuda)
    if speed.compile is True and obstacle:
        raise UserError(f"speed.compile = true: {obstacle}")
    if speed.optimizer == "apex":
        _check_apex(cuda)
    # Not tried: compiled encoders with the collectives of several processes or of synchronised batch norm.
    automatic = cuda and not obstacle and processes.world_size == 1 and config.bn.mode != "sync" and not speed.recompute
    return Speed(
        channels_last=speed.channels_last,
        compile=automatic if speed.compile == "auto" else speed.compile,
        cuda_graph=speed.cuda_graph,
        key_stream=speed.key_stream,
        key_twin=speed.key_twin,
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


def _compiler_obstacle(cuda: bool) -> str | None:
    """Why torch.compile cannot work here, or None: it writes C++ for a CPU; for a GPU Triton, with launchers in C."""
    if cuda and importlib.util.find_spec("triton") is None:
        return "on a GPU it needs Triton: pip install triton"
    variable, usual = ("CC", ["gcc", "clang", "cc"]) if cuda else ("CXX", ["g++"])
    names = shlex.split(os.environ.get(variable, ""))[:1] or usual
    if not any(map(shutil.which, names)):
        return f"it needs a compiler, and there is no {' or '.join(names)}"
    return None


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
        # Nothing here reads what it has not written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
