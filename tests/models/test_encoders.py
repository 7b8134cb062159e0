"""Encoders, momentum update, queue."""

import pytest
import torch
import torch.nn.functional as F

from synco_fast.errors import UserError
from synco_fast.models.encoders import Encoder, architectures, momentum_update, recompute_activations
from synco_fast.models.queue import KeyQueue


@pytest.mark.parametrize("arch", ["resnet10_narrow", "resnet18", "resnet50"])
@pytest.mark.parametrize("mlp", [True, False])
def test_encoder_shapes(arch: str, mlp: bool) -> None:
    encoder = Encoder(arch, dim=24, mlp=mlp).eval()
    width = {"resnet10_narrow": 192, "resnet18": 512, "resnet50": 2048}[arch]
    images = torch.randn(2, 3, 64, 64)
    assert encoder.backbone(images).shape == (2, width)
    assert encoder(images).shape == (2, 24)
    assert len(encoder.head) == (3 if mlp else 1)


def test_cifar_stem_keeps_the_resolution() -> None:
    encoder = Encoder("resnet18", stem="cifar").eval()
    stem = encoder.backbone.maxpool(encoder.backbone.conv1(torch.randn(1, 3, 32, 32)))
    assert stem.shape[-2:] == (32, 32)


def test_unknown_architecture_names_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"resnet51.*resnet50"):
        Encoder("resnet51")
    assert "vit_b_16" not in architectures()


def test_momentum_update_moves_parameters_and_leaves_buffers() -> None:
    query, key = Encoder("resnet18", dim=4), Encoder("resnet18", dim=4)
    query.backbone.bn1.running_mean.fill_(7.0)
    expected = [0.9 * k.double() + 0.1 * q.double() for k, q in zip(key.parameters(), query.parameters(), strict=True)]
    momentum_update(key, query, 0.9)
    for got, want in zip(key.parameters(), expected, strict=True):
        assert torch.allclose(got.double(), want, atol=1e-6)
    assert key.backbone.bn1.running_mean.abs().max() == 0


def test_queue_starts_with_unit_rows_and_replaces_the_oldest() -> None:
    queue = KeyQueue(10, 6, torch.float16, torch.Generator().manual_seed(0))
    assert torch.allclose(queue.rows.float().norm(dim=1), torch.ones(10), atol=1e-3)
    keys = F.normalize(torch.randn(3, 4, 6), dim=2)
    for part in keys:
        queue.enqueue(part, skip=torch.zeros(()))
    assert queue.pointer == 2
    assert torch.equal(queue.rows[4:8], keys[1].half())
    assert torch.equal(queue.rows[[8, 9, 0, 1]], keys[2].half())


def test_a_masked_enqueue_changes_nothing() -> None:
    queue = KeyQueue(8, 4, torch.float32, torch.Generator().manual_seed(0))
    before = queue.rows.clone()
    queue.enqueue(torch.full((4, 4), torch.nan), skip=torch.ones(()))
    assert torch.equal(queue.rows, before) and queue.pointer == 0


def test_recomputing_in_evaluation_leaves_the_counters_alone() -> None:
    encoder = Encoder("resnet10_narrow").eval()
    recompute_activations(encoder)
    before = {name: value.clone() for name, value in encoder.named_buffers()}
    encoder(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in encoder.named_buffers())
