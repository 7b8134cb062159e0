"""What the encoders compute in a step, and what the device computes at best."""

import time

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from synco_fast.config import Config
from synco_fast.models.encoders import Encoder
from synco_fast.profiling.rounds import device_clock

_SIZES = {"cuda": (8192,), "cpu": (512, 1024, 2048)}  # short ones, as a busy CPU interrupts long ones
_REPEATS = 20
_SECONDS = 1.0


def encoder_flops(config: Config, samples: int) -> int:
    """Floating-point operations of a step's encoders on this many images: query forward and backward, key forward.

    Counted on tensors without data. What `speed.recompute` computes twice counts once.
    """
    size = config.data.image_size
    with torch.device("meta"):
        encoder = Encoder(config.model.arch, stem=config.model.stem, dim=config.model.dim, mlp=config.model.mlp)
        images = torch.empty(samples, 3, size, size)
    forward = _forward_flops(encoder, images)
    return 2 * forward + backward_flops(encoder, images)


def backward_flops(encoder: nn.Module, images: Tensor) -> int:
    """Of a backward pass: two products for each one forward, as of weights and of inputs, but none of the images.

    The first convolution is taken for the only layer that sees the images. Not counted by FlopCounterMode, which takes
    the weights' gradient of a grouped convolution for that of a dense one.
    """
    first = next(module for module in encoder.modules() if isinstance(module, nn.Conv2d))
    return 2 * _forward_flops(encoder, images) - _forward_flops(first, images)


def _forward_flops(module: nn.Module, images: Tensor) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(images)
    return counter.get_total_flops()


def product_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product: the fastest of some, as others may be at work."""
    return max(_product_speed(size, device, dtype) for size in _SIZES[device.type])


def _product_speed(size: int, device: torch.device, dtype: torch.dtype) -> float:
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    torch.mm(left, right)
    times, end = list[int](), time.perf_counter() + _SECONDS
    while not times or (len(times) < _REPEATS and time.perf_counter() < end):
        times.append(device_clock(lambda: torch.mm(left, right), device))
    return 2 * size**3 / (min(times) / 1e9)
