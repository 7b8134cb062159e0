"""Who is compared by bench.step: MoCo and SynCo as people write them, ours, and ours with one thing changed.

All have the same encoder, random start, images and sizes, so that only the step differs. What is written here is in our
own words, from the papers and from what demonstrations do; no line is taken from released code.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import published
from synco_fast import config_text
from synco_fast.config import Config, parse
from synco_fast.data.index import Index
from synco_fast.engine import speed as speeds
from synco_fast.engine.distributed import Processes
from synco_fast.engine.run import build_contrast, build_loader
from synco_fast.engine.step import TrainStep
from synco_fast.methods import MomentumContrast
from synco_fast.models.encoders import Encoder
from synco_fast.models.queue import KeyQueue
from synco_fast.profiling.peak import encoder_flops

Views = tuple[Tensor, ...]
"""Images of queries and of keys (B, 3, H, W)."""

Step = Callable[[], Tensor]
"""One whole training step; returns its loss, a scalar that stays on the device."""

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""loss(q, k, queue): q and k (B, D), queue (K, D)."""

_BATCHES = 4


class Batches(NamedTuple):
    """A few batches that contenders take in turn, in both memory formats: ours is fed channels last by its loader."""

    contiguous: list[Views]
    channels_last: list[Views]


def random_batches(config: Config, device: torch.device) -> Batches:
    """Standard normal images in float32, as they are after normalisation."""
    shape = (config.data.batch_size, 3, config.data.image_size, config.data.image_size)
    generator = torch.Generator(device).manual_seed(config.seed)
    images = [torch.randn(shape, generator=generator, device=device) for _ in range(2 * _BATCHES)]
    last = [image.contiguous(memory_format=torch.channels_last) for image in images]
    of_both: list[list[Views]] = [list(zip(kept[::2], kept[1::2], strict=True)) for kept in (images, last)]
    return Batches(*of_both)


class FoldedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm in groups, each with statistics of its own, by folding the groups into the channels, as demonstrations
    of MoCo on one GPU do. Samples a group size apart are of one group. The running statistics are the groups' mean."""

    def __init__(self, num_features: int, groups: int) -> None:
        super().__init__(num_features)
        self.groups = groups

    def forward(self, images: Tensor) -> Tensor:
        samples, channels, height, width = images.shape
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        means, variances = (kept.repeat(self.groups) for kept in (self.running_mean, self.running_var))
        folded = images.reshape(samples // self.groups, self.groups * channels, height, width)
        weight, bias = self.weight.repeat(self.groups), self.bias.repeat(self.groups)
        normal = F.batch_norm(folded, means, variances, weight, bias, True, self.momentum, self.eps)
        self.running_mean.copy_(means.view(self.groups, channels).mean(dim=0))
        self.running_var.copy_(variances.view(self.groups, channels).mean(dim=0))
        return normal.view(samples, channels, height, width)


def _fold_batch_norm(module: nn.Module, groups: int) -> None:
    for name, child in module.named_children():
        if type(child) is nn.BatchNorm2d:
            setattr(module, name, FoldedBatchNorm2d(child.num_features, groups))
        else:
            _fold_batch_norm(child, groups)


class PlainStep:
    """Momentum contrast as people write it: NCHW, autocast, a loop over the parameters, a pointer on the host.

    Args:
        config: sizes, momentum, optimizer, precision. device: where.
        loss: of q, k and the queue. columns: the queue lies in memory as (D, K), MoCo's way.
        folded: batch norm in groups, keys' images shuffled over them; else plain batch norm, which is cheaper than what
            MoCo needs on one process, as it lets a key give away its query.
        compiled: both encoders by torch.compile.
    """

    def __init__(
        self,
        config: Config,
        device: torch.device,
        loss: Loss,
        *,
        columns: bool = False,
        folded: bool = False,
        compiled: bool = False,
    ) -> None:
        torch.manual_seed(config.seed)
        model, optim = config.model, config.optim
        self.query_encoder, self.key_encoder = (
            Encoder(model.arch, stem=model.stem, dim=model.dim, mlp=model.mlp) for _ in range(2)
        )
        self.key_encoder.load_state_dict(self.query_encoder.state_dict())
        for encoder in (self.query_encoder, self.key_encoder):
            if folded:
                _fold_batch_norm(encoder, config.data.batch_size // config.bn.group_size)
            encoder.to(device)
        self.key_encoder.requires_grad_(False)
        generator = torch.Generator().manual_seed(config.seed)
        self.queue = KeyQueue(config.queue.size, model.dim, torch.float32, generator).rows.to(device)
        if columns:
            self.queue = self.queue.T.contiguous().T
        self.pointer, self.loss, self.folded = 0, loss, folded
        encode: list[Callable[[Tensor], Tensor]] = [self.query_encoder, self.key_encoder]
        self.encode_queries, self.encode_keys = map(torch.compile, encode) if compiled else encode
        self.optimizer = torch.optim.SGD(
            self.query_encoder.parameters(), optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay
        )
        self.momentum = model.momentum
        self._autocast = (device.type, torch.bfloat16, config.trainer.precision == "bf16")

    def __call__(self, views: Views) -> Tensor:
        device, dtype, enabled = self._autocast
        with torch.autocast(device, dtype, enabled=enabled):
            q = F.normalize(self.encode_queries(views[0]), dim=1)
            with torch.no_grad():
                for key, query in zip(self.key_encoder.parameters(), self.query_encoder.parameters(), strict=True):
                    key.mul_(self.momentum).add_(query, alpha=1 - self.momentum)
                k = F.normalize(self._keys(views[1]), dim=1)
            loss = self.loss(q, k, self.queue)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            self.queue[self.pointer : self.pointer + len(k)] = k
        self.pointer = (self.pointer + len(k)) % len(self.queue)
        return loss.detach()

    def _keys(self, images: Tensor) -> Tensor:
        if not self.folded:
            return self.encode_keys(images)
        order = torch.randperm(len(images), device=images.device)
        return self.encode_keys(images[order])[torch.argsort(order)]


class Built(NamedTuple):
    """A contender ready to run.

    Attributes:
        step: of the training. config: what it was built from.
        speed: as it was resolved; None where it is not ours.
        within: makes what its steps must run within.
    """

    step: Step
    config: Config
    speed: dict[str, bool] | None = None
    within: Callable[[], AbstractContextManager[Any]] = nullcontext


Build = Callable[[Config, torch.device, Batches], Built]


class Contender(NamedTuple):
    """Its method, how it is built from a configuration, and its batch norm where that is not the configuration's."""

    method: str
    build: Build
    batch_norm: str | None = None


def _plain(loss: Callable[[Config], Loss], **how: bool) -> Build:
    def build(config: Config, device: torch.device, batches: Batches) -> Built:
        step, endless = PlainStep(config, device, loss(config), **how), itertools.cycle(batches.contiguous)
        return Built(lambda: step(next(endless)), config)

    return build


def moco_loss(config: Config) -> Loss:
    temperature = config.loss.temperature
    return lambda q, k, queue: published.moco(q, k, queue.T, temperature)


def _compiled_moco_loss(config: Config) -> Loss:
    return torch.compile(moco_loss(config))


def published_loss(config: Config) -> Loss:
    hard, temperature = config.negatives.hard(), config.loss.temperature
    return lambda q, k, queue: published.published(q, k, queue, hard, temperature)


def vectorised_loss(config: Config) -> Loss:
    hard, temperature = config.negatives.hard(), config.loss.temperature
    return lambda q, k, queue: published.published_vectorised(q, k, queue, hard, temperature)


class OurStep:
    """A step of `synco-fast pretrain`, without its loop.

    Attributes:
        speed: as it was resolved. train: the step. contrast: its model.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        processes = Processes(0, 1, device)
        self.speed = speeds.resolve(config, processes)
        self.contrast = speeds.apply(self.speed, build_contrast(config, processes))
        self.train = TrainStep(config, processes, self.contrast, self.speed)
        self._config, self._hard, self._number = config, config.negatives.hard(), itertools.count()

    def __call__(self, views: Views) -> Tensor:
        self.train(views, self._hard, next(self._number), self._config.optim.lr)
        return self.train.guard.loss


Change = Callable[[OurStep], None]


def ours(change: Change | None = None) -> Build:
    """Our step, with something about it replaced once it is built."""

    def build(config: Config, device: torch.device, batches: Batches) -> Built:
        step, endless = OurStep(config, device), itertools.cycle(batches.channels_last)
        if change is not None:
            change(step)
        return Built(lambda: step(next(endless)), config, dataclasses.asdict(step.speed))

    return build


def ours_with(override: str) -> Build:
    """Our step with one key of its configuration changed, as `--set` takes it."""

    def build(config: Config, device: torch.device, batches: Batches) -> Built:
        values = config.model_dump()
        config_text.apply_override(values, override)
        return ours()(parse(values, override), device, batches)

    return build


def ours_from_files(index: Index) -> Build:
    """Our step fed by our loader. The loader is open around its steps only, lest it work beside others' steps, and what
    it made before they began is taken first, untimed."""

    def build(config: Config, device: torch.device, batches: Batches) -> Built:
        step, loader = OurStep(config, device), build_loader(config, Processes(0, 1, device), index, {})

        def fed() -> Tensor:
            return step(next(loader).views)

        @contextmanager
        def opened() -> Iterator[None]:
            try:
                for _ in range(config.data.prefetch + 1):
                    fed()
                yield
            finally:
                loader.close()

        return Built(fed, config, dataclasses.asdict(step.speed), opened)

    return build


CONTENDERS = {
    "moco_eager": Contender("moco", _plain(moco_loss, columns=True), "plain"),
    "moco_eager_split": Contender("moco", _plain(moco_loss, columns=True, folded=True), "folded"),
    "moco_compiled": Contender("moco", _plain(_compiled_moco_loss, columns=True, compiled=True), "plain"),
    "published": Contender("synco", _plain(published_loss), "plain"),
    "vectorised": Contender("synco", _plain(vectorised_loss), "plain"),
    "moco": Contender("moco", ours()),
    "mochi": Contender("mochi", ours()),
    "synco": Contender("synco", ours()),
}


def _momentum_update_in_a_loop(step: OurStep) -> None:
    contrast: MomentumContrast = step.contrast

    @torch.no_grad()
    def update(momentum: float) -> None:
        pairs = zip(contrast.key_encoder.parameters(), contrast.query_encoder.parameters(), strict=True)
        for key, query in pairs:
            key.mul_(momentum).add_(query, alpha=1 - momentum)

    contrast.update_keys = update  # type: ignore[method-assign]


class _ForeachSGD(torch.optim.SGD):
    """What fused SGD replaces. It cannot leave out a step on the device's word, and is not asked to."""

    def step(self, closure: Any = None) -> Any:
        self.found_inf = None
        return super().step(closure)


def _foreach_optimizer(step: OurStep) -> None:
    group = step.train.optimizer.param_groups[0]
    settings = {name: group[name] for name in ("lr", "momentum", "weight_decay")}
    step.train.optimizer = _ForeachSGD(group["params"], **settings, foreach=True)


CHANGES: Mapping[str, Change] = {
    "momentum update in a loop": _momentum_update_in_a_loop,
    "optimizer foreach": _foreach_optimizer,
}
"""What is replaced by what it replaced, and is no key of the configuration."""


def ablated_keys(config: Config, device: torch.device) -> Iterable[str]:
    """Keys and values that differ from the defaults' on this device, one change each, as `--set` takes them."""
    compiled = speeds.resolve(config, Processes(0, 1, device)).compile
    yield "speed.channels_last=false"
    yield f"speed.compile={'false' if compiled else 'true'}"
    yield f"trainer.precision={'fp32' if config.trainer.precision == 'bf16' else 'bf16'}"
    if config.trainer.precision == "bf16":
        yield "speed.key_twin=true"
    yield "speed.recompute=true"
    yield "bn.mode=plain"
    if device.type == "cuda":
        yield from ("speed.cuda_graph=true", "speed.key_stream=true", "speed.optimizer=apex")


def model_flops(config: Config) -> int:
    """Floating-point operations of one step of MoCo, two for a multiply-add: the encoders' convolutions and linear
    layers, forward and backward for the queries and forward for the keys, and the loss's products of q with the key and
    the queue, and of their gradient. What else a contender computes is not the model's."""
    batch_size, products = config.data.batch_size, (1 + config.queue.size) * config.model.dim
    return encoder_flops(config, batch_size) + 2 * batch_size * 2 * products
