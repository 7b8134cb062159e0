"""Floating-point operations of the encoders, counted on tensors without data."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from synco_fast.config import Config, parse
from synco_fast.models.encoders import Encoder
from synco_fast.profiling.peak import backward_flops, encoder_flops


def config(arch: str) -> Config:
    return parse({"model": {"arch": arch}, "trainer": {"device": "cpu"}}, "test")


def counted(arch: str) -> tuple[int, int]:
    """Forward and backward of an image by torch's counter, which is right where no convolution is grouped."""
    with torch.device("meta"):
        encoder, images = Encoder(arch), torch.empty(1, 3, 224, 224)
    with FlopCounterMode(display=False) as forward:
        embeddings = encoder(images)
    with FlopCounterMode(display=False) as backward:
        embeddings.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


def test_a_grouped_layer_by_hand() -> None:
    """Pixels x kernel x channels in of a group x channels out, two for a multiply-add."""
    with torch.device("meta"):
        layers = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.Conv2d(16, 32, 3, padding=1, groups=8, bias=False)
        )
        images = torch.empty(4, 3, 10, 10)
    first, grouped = 2 * 4 * 100 * 9 * 3 * 16, 2 * 4 * 100 * 9 * 2 * 32
    assert backward_flops(layers, images) == first + 2 * grouped


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "resnet10_narrow"])
def test_dense_networks_as_torch_counts_them(arch: str) -> None:
    forward, backward = counted(arch)
    assert encoder_flops(config(arch), samples=2) == 2 * (2 * forward + backward)


def test_a_grouped_network_is_at_most_four_times_its_forward() -> None:
    """Twice forward, and backward less than twice that; by torch's counter, 5.67 times."""
    forward, _ = counted("resnext50_32x4d")
    assert 3.9 * forward < encoder_flops(config("resnext50_32x4d"), samples=1) < 4 * forward
