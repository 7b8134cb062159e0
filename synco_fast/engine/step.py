"""The training step. Nothing in it waits for the device, so that one step can be prepared while another runs."""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from synco_fast.config import Config
from synco_fast.engine import optim
from synco_fast.engine.distributed import Processes
from synco_fast.engine.graph import GraphedStep
from synco_fast.engine.guard import NonFiniteGuard
from synco_fast.engine.metrics import Meter
from synco_fast.engine.speed import Speed
from synco_fast.methods import MomentumContrast
from synco_fast.models.shuffle import Gathering
from synco_fast.ops import HardNegatives
from synco_fast.stages import stage


class TrainStep:
    """One optimizer step: momentum update, contrast, backward, update, enqueue.

    Args:
        config: of the run. processes: this one among them. contrast: the method, its model.
        speed: how the step is computed, as `speed.resolve` has it.

    Attributes:
        optimizer, meter, guard: of this run; the step feeds them.
    """

    def __init__(self, config: Config, processes: Processes, contrast: MomentumContrast, speed: Speed) -> None:
        self.config, self.processes, self.contrast = config, processes, contrast
        self.optimizer = optim.build(config.optim, contrast.query_encoder.parameters(), apex=speed.apex)
        # The wrapper averages gradients; names in checkpoints are those of the module inside.
        self.model: nn.Module = contrast
        if processes.world_size > 1:
            # A step that averages gradients with its last micro-batch only is not the static graph that torch expects.
            whole = config.trainer.accumulate == 1
            self.model = DistributedDataParallel(
                contrast, broadcast_buffers=False, gradient_as_bucket_view=True, static_graph=whole
            )
        self.meter = Meter(config.negatives.hard(), processes.device)
        self.guard = NonFiniteGuard(len(self.meter.names), config.trainer.skip_nonfinite, processes.device)
        # A bad step's forward pass leaves its mark in batch norm's running statistics, too.
        encoders = (contrast.query_encoder, contrast.key_encoder) if config.trainer.skip_nonfinite else ()
        self._statistics = [rows for encoder in encoders for rows in encoder.buffers() if rows.is_floating_point()]
        self._parameters = list(contrast.query_encoder.parameters())
        self._channels_last = speed.channels_last
        self._step = torch.zeros((), dtype=torch.int64, device=processes.device)
        # A captured graph reads the rate anew at each step, as it does the number of the step.
        self._lr = torch.zeros((), device=processes.device) if speed.cuda_graph else None
        self._run = GraphedStep(self._step_on_device, processes.device) if speed.cuda_graph else self._step_on_device

    def __call__(
        self, views: Sequence[Tensor], hard: HardNegatives, step: int, lr: float, labels: Tensor | None = None
    ) -> None:
        """Take a step.

        Args:
            views: query and key view (B, 3, H, W) of this process's images.
            hard: synthetic negatives of this step.
            step: number of the step, from 0. lr: learning rate.
            labels: (B,) int64 classes of these images, on the device, with the class oracle; None without.
        """
        self._step.fill_(step)
        optim.set_rate(self.optimizer, lr, self._lr)
        self._run([*views] if labels is None else [*views, labels], hard)

    def settle(self, images: Tensor) -> None:
        """Have DDP lay out its buckets as it will keep them: it does so by the order of a first backward pass.

        The layout decides in which order gradients of three processes or more are summed, so a run that goes on would
        otherwise take its first step with other roundings than one that was never stopped. Nothing of this pass stays.

        Args:
            images: (n, 3, H, W) on the device, any, the same on every process.
        """
        before = [(rows, rows.clone()) for rows in self.contrast.buffers()]
        labels = (
            [] if self.contrast.queue.labels is None else [torch.zeros_like(self.contrast.queue.labels[: len(images)])]
        )
        for _ in range(2):  # of a static graph, the first pass is unlike all others
            with self._precision():
                view = self._images(images)
                contrast = self.model(view, view, HardNegatives.none(), self._step, 0, 0, *labels)
            contrast.result.loss.backward()
        for parameter in self._parameters:
            parameter.grad = None
        for rows, kept in before:
            rows.copy_(kept)

    def _step_on_device(self, inputs: Sequence[Tensor], hard: HardNegatives) -> None:
        """All of a step that is the device's work: what a CUDA graph can hold. Inputs: two views, perhaps labels."""
        with stage("momentum update"):
            self.contrast.update_keys(self.config.model.momentum)
        statistics = [rows.clone() for rows in self._statistics]
        results, keys, gathered = [], [], []
        micro_batches = list(zip(*(rows.chunk(self.config.trainer.accumulate) for rows in inputs), strict=True))
        row = self.processes.rank * len(inputs[0])
        for i, (query_view, key_view, *labels) in enumerate(micro_batches):
            with self._no_sync(unless=i == len(micro_batches) - 1):
                with self._precision():
                    query_images, key_images = self._images(query_view), self._images(key_view)
                    contrast = self.model(query_images, key_images, hard, self._step, row, i, *labels)
                keys.append(contrast.keys)
                if len(keys) == len(micro_batches):  # while the gradients are computed
                    gathered = [Gathering(rows) for rows in (torch.cat(keys), *inputs[2:])]
                with stage("backward"):
                    (contrast.result.loss / len(micro_batches)).backward()
            row += len(query_view)
            results.append(contrast.result)

        with stage("metrics"):
            norm = self._gradient_norm()
            values = self.meter.values(results, norm)
            self.guard.watch(values[0], norm, self._step, values)
            self.meter.add(values, self.guard.skip)
            for rows, before in zip(self._statistics, statistics, strict=True):
                rows.copy_(torch.where(self.guard.skip > 0, before, rows))
        with stage("optimizer"):
            optim.step(self.optimizer, self.guard.skip)
            for parameter in self._parameters:
                parameter.grad = None
        with stage("enqueue"):
            keys_of_all, *labels_of_all = (rows.rows() for rows in gathered)
            self.contrast.queue.enqueue(keys_of_all, self.guard.skip, *labels_of_all)

    def _gradient_norm(self) -> Tensor:
        """Of all gradients, before they are clipped as configured."""
        norm = nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None], foreach=True)
        if self.config.optim.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self._parameters, self.config.optim.clip_norm, norm, foreach=True)
        return norm

    def _precision(self) -> Any:
        bf16 = self.config.trainer.precision == "bf16"
        return torch.autocast(self.processes.device.type, torch.bfloat16, enabled=bf16)

    def _images(self, view: Tensor) -> Tensor:
        view = view if self.config.trainer.precision == "bf16" else view.float()
        return view if self._channels_last else view.contiguous()

    def _no_sync(self, unless: bool) -> Any:
        """Gradients are averaged over processes with the last micro-batch's backward only."""
        if unless or not isinstance(self.model, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.model.no_sync()
