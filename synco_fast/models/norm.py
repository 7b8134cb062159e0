"""Batch norm over which samples: the choice that keeps a key from giving away its query.

A query and its key that share batch statistics can be matched through them (MoCo, arXiv 1911.05722, section 3.3).
MoCo shuffles the keys over processes. On one process the same is had by splitting the batch into virtual groups
(`SplitBatchNorm2d`) and shuffling the keys over those.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from synco_fast.ops.philox import philox


class SplitBatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose training statistics are those of groups of `group_size` neighbouring samples.

    The running statistics take one step of the layer's momentum for each batch, shared out over its groups.
    In evaluation it is plain batch norm.
    """

    def __init__(self, num_features: int, group_size: int) -> None:
        super().__init__(num_features)
        self.group_size = group_size

    def forward(self, images: Tensor) -> Tensor:
        if not self.training:
            return super().forward(images)
        groups = -(-len(images) // self.group_size)
        assert self.num_batches_tracked is not None and self.momentum is not None
        self.num_batches_tracked.add_(1)
        share = 1 - (1 - self.momentum) ** (1 / groups)
        if torch.compiler.is_compiling() and len(images) % self.group_size == 0:
            return self._in_one_pass(images, groups, share)
        # Slices of the batch keep the memory format, which folding groups into channels would not.
        return torch.cat(
            [
                F.batch_norm(group, self.running_mean, self.running_var, self.weight, self.bias, True, share, self.eps)
                for group in images.split(self.group_size)
            ]
        )

    def _in_one_pass(self, images: Tensor, groups: int, share: float) -> Tensor:
        """For compilers, which fuse this with what stands around it, and would not fuse layers side by side."""
        samples, channels, height, width = images.shape
        # Rows of pixels as channels-last images lie in memory, so that this is a view.
        pixels = images.permute(0, 2, 3, 1).reshape(groups, samples // groups * height * width, channels).float()
        variance, mean = torch.var_mean(pixels, dim=1, correction=0, keepdim=True)
        normal = (pixels - mean) * (variance + self.eps).rsqrt() * self.weight + self.bias
        # The running statistics as the groups one after the other would move them.
        assert self.running_mean is not None and self.running_var is not None
        ages = torch.arange(groups - 1, -1, -1, device=images.device, dtype=torch.float32)
        weights = (share * (1 - share) ** ages)[:, None]
        unbiased = variance[:, 0] * (pixels.shape[1] / (pixels.shape[1] - 1))
        # Sums, and not products of matrices, which autocast would round.
        self.running_mean.mul_((1 - share) ** groups).add_((weights * mean[:, 0].detach()).sum(dim=0))
        self.running_var.mul_((1 - share) ** groups).add_((weights * unbiased.detach()).sum(dim=0))
        normal = normal.to(images.dtype).view(samples, height, width, channels).permute(0, 3, 1, 2)
        return normal if images.is_contiguous(memory_format=torch.channels_last) else normal.contiguous()


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose training statistics are those of all processes, of as many samples each; on any device."""

    def forward(self, images: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized():
            return super().forward(images)
        assert self.num_batches_tracked is not None and self.momentum is not None
        assert self.running_mean is not None and self.running_var is not None
        self.num_batches_tracked.add_(1)
        processes = dist.get_world_size()
        variance, mean = torch.var_mean(images.float(), dim=(0, 2, 3), correction=0)
        mean_of_all = all_reduce(mean) / processes
        variance_of_all = all_reduce(variance + (mean - mean_of_all) ** 2) / processes
        pixels = images.numel() // images.shape[1] * processes
        self.running_mean.lerp_(mean_of_all.detach(), self.momentum)
        self.running_var.lerp_(variance_of_all.detach() * (pixels / (pixels - 1)), self.momentum)
        scale = self.weight * (variance_of_all + self.eps).rsqrt()
        shift = self.bias - mean_of_all * scale
        return (images * scale[:, None, None] + shift[:, None, None]).to(images.dtype)


def use_split_batch_norm(module: nn.Module, group_size: int) -> None:
    """Replace every BatchNorm2d in place; parameters start as they were."""
    _replace(module, lambda features: SplitBatchNorm2d(features, group_size))


def use_sync_batch_norm(module: nn.Module, device: torch.device) -> nn.Module:
    """The module with batch norm over all processes: torch's where that runs, on GPUs."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    _replace(module, SyncBatchNorm2d)
    return module


def _replace(module: nn.Module, make: Callable[[int], nn.BatchNorm2d]) -> None:
    """Put other layers, made for a number of features, in the places of every BatchNorm2d."""
    for name, child in module.named_children():
        if type(child) is nn.BatchNorm2d:
            layer = make(child.num_features)
            layer.load_state_dict(child.state_dict())
            setattr(module, name, layer)
        else:
            _replace(child, make)


def key_permutation(samples: int, seed: int, step: Tensor, micro_batch: int, first: int = 0) -> Tensor:
    """A random permutation (samples,) int64, a function of (seed, step, micro_batch, first), made on the step's device.

    Args:
        first: number of the first sample in the whole batch, where processes shuffle differently.
    """
    # The third counter word sets these draws apart from the op's, whose kinds are below 6.
    rows = torch.arange(first, first + samples, device=step.device)
    words = philox(seed, rows, micro_batch, 0xFF, step)
    return torch.argsort((words[0] << 31) ^ words[1], stable=True)
