"""Split batch norm, key shuffling."""

import pytest
import torch
import torchvision
from torch import nn

from synco_fast.models.norm import SplitBatchNorm2d, key_permutation, use_split_batch_norm
from synco_fast.models.shuffle import encode_shuffled


def test_split_batch_norm_normalises_each_group_by_its_own_statistics() -> None:
    torch.manual_seed(0)
    images = (torch.randn(12, 3, 5, 4) * torch.arange(1, 13).view(-1, 1, 1, 1)).requires_grad_()
    layer = SplitBatchNorm2d(3, group_size=4)
    nn.init.normal_(layer.weight)
    output = layer(images)
    wide = images.detach().double().requires_grad_()
    groups = []
    for group in wide.split(4):
        mean = group.mean(dim=(0, 2, 3), keepdim=True)
        variance = group.var(dim=(0, 2, 3), unbiased=False, keepdim=True)
        groups.append((group - mean) / (variance + layer.eps).sqrt())
    expected = torch.cat(groups) * layer.weight.detach().double().view(-1, 1, 1)
    assert torch.allclose(output.double(), expected, atol=1e-5)
    cotangent = torch.randn_like(output)
    (gradient,) = torch.autograd.grad(output, images, cotangent)
    (expected_gradient,) = torch.autograd.grad(expected, wide, cotangent.double())
    assert torch.allclose(gradient.double(), expected_gradient, atol=1e-5)


def test_one_group_is_plain_batch_norm_with_its_running_statistics() -> None:
    torch.manual_seed(0)
    images = torch.randn(8, 3, 4, 4) + 2
    split, plain = SplitBatchNorm2d(3, group_size=8), nn.BatchNorm2d(3)
    assert torch.equal(split(images), plain(images))
    assert torch.allclose(split.running_mean, plain.running_mean)
    assert torch.allclose(split.running_var, plain.running_var)
    assert torch.equal(split.eval()(images), plain.eval()(images)) and split.num_batches_tracked == 1


def test_split_keeps_channels_last_and_replaces_every_layer() -> None:
    network = torchvision.models.resnet18()
    use_split_batch_norm(network, 2)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 20 and all(type(norm) is SplitBatchNorm2d for norm in norms)
    images = torch.randn(4, 64, 3, 3).contiguous(memory_format=torch.channels_last)
    assert norms[0](images).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_form_for_compilers_is_the_same(precision: torch.dtype, layout: torch.memory_format) -> None:
    """Outputs, gradients and, over 50 batches, running statistics, in float32 under autocast too; memory as it came."""
    torch.manual_seed(0)
    sliced, whole = SplitBatchNorm2d(6, group_size=4), SplitBatchNorm2d(6, group_size=4)
    share = 1 - 0.9 ** (1 / 3)
    # Pixels go to 10, so a mean is off by some of 10 units, and the difference to it by as many.
    rounding = 10 * torch.finfo(precision).eps
    for _ in range(50):
        images = 5 + torch.randn(12, 6, 5, 4).to(precision).contiguous(memory_format=layout)
        mine, other = images.clone().requires_grad_(), images.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            expected, found = sliced(mine), whole._in_one_pass(other, 3, share)
        assert found.dtype == precision and found.is_contiguous(memory_format=layout)
        assert torch.allclose(found, expected, rtol=rounding, atol=4 * rounding)
        cotangent = torch.randn_like(expected)
        expected.backward(cotangent)
        found.backward(cotangent)
        assert torch.allclose(other.grad, mine.grad, rtol=rounding, atol=4 * rounding)  # type: ignore[arg-type]
    for name in ("running_mean", "running_var"):
        assert torch.allclose(whole.get_buffer(name), sliced.get_buffer(name), rtol=1e-5), name


def test_key_permutation_is_a_function_of_seed_step_and_micro_batch() -> None:
    orders = [
        key_permutation(64, seed, torch.tensor(step), micro_batch)
        for seed, step, micro_batch in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))
    ]
    for order in orders:
        assert torch.equal(order.sort().values, torch.arange(64))
    assert len({tuple(order.tolist()) for order in orders}) == 4
    assert torch.equal(orders[0], key_permutation(64, 0, torch.tensor(0), 0))


def test_keys_come_back_in_their_order() -> None:
    images = torch.randn(16, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    seen = []

    def encode(batch: torch.Tensor) -> torch.Tensor:
        seen.append(batch)
        return batch.flatten(1)

    keys = encode_shuffled(encode, images, 3, torch.tensor(5), 0)
    assert torch.equal(keys, images.flatten(1))
    assert not torch.equal(seen[0], images)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
