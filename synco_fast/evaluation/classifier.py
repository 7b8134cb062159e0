"""A linear classifier on a backbone, trained by SGD: the loop that the linear probe and fine-tuning share."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from synco_fast.config import DTYPES, Optim
from synco_fast.data.index import Index
from synco_fast.data.loader import Batch, TrainLoader
from synco_fast.data.recipes import SUPERVISED
from synco_fast.engine import optim
from synco_fast.engine.distributed import gather_numbers, reduce_sum
from synco_fast.engine.metrics import Means
from synco_fast.engine.probe import evaluation_loader
from synco_fast.engine.run import loader_place
from synco_fast.engine.schedules import learning_rate
from synco_fast.engine.speed import choose_algorithms
from synco_fast.engine.trainer import Clock
from synco_fast.errors import Interrupted, UserError
from synco_fast.evaluation.journal import Journal
from synco_fast.evaluation.session import Session
from synco_fast.models.encoders import Encoder
from synco_fast.models.shuffle import broadcast_buffers

MOMENTUM = 0.9
LOG_EVERY = 50
"""Steps between log rows within an epoch; the host waits for the device only there."""


@dataclass(frozen=True)
class Protocol:
    """How a classifier is trained.

    Attributes:
        epochs, batch_size: of all processes together. seed: of the head's start, order and views.
        lr_head: learning rate at the start. lr_backbone: that of the backbone; None: it is frozen, in evaluation mode.
        weight_decay: of all that is trained.
        milestones: epochs at which the rates fall to a tenth; None: they follow a cosine, epoch by epoch.
    """

    epochs: int
    batch_size: int
    seed: int
    lr_head: float
    lr_backbone: float | None
    weight_decay: float
    milestones: tuple[int, ...] | None

    @property
    def rates(self) -> dict[str, float]:
        """Learning rates at the start, by the names of their options, without dashes."""
        if self.lr_backbone is None:
            return {"lr": self.lr_head}
        return {"lr_backbone": self.lr_backbone, "lr_head": self.lr_head}

    def factor(self, epoch: int) -> float:
        """What the rates are multiplied by in an epoch, from 0."""
        schedule = (
            Optim(lr=1.0, schedule="cosine")
            if self.milestones is None
            else Optim(lr=1.0, schedule="step", milestones=list(self.milestones))
        )
        return learning_rate(schedule, self.epochs, epoch, 0, 1)


class Classifier(nn.Module):
    """Images (B, 3, H, W) to logits (B, classes), float32: a backbone and one linear layer.

    Args:
        encoder: whose backbone. classes: number of them.
        frozen: the backbone learns nothing, statistics of batch norm included. bf16: it runs under autocast.
    """

    def __init__(self, encoder: Encoder, classes: int, *, frozen: bool, bf16: bool) -> None:
        super().__init__()
        self.backbone = encoder.backbone.requires_grad_(not frozen)
        self.head = nn.Linear(encoder.width, classes)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)
        self._frozen, self._bf16 = frozen, bf16

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self._bf16):
            features = self.backbone(images if self._bf16 else images.float())
        return self.head(features.float())

    def train(self, mode: bool = True) -> "Classifier":
        super().train(mode)
        self.backbone.train(mode and not self._frozen)
        return self

    def learnt(self) -> nn.Module:
        """What training changes."""
        return self.head if self._frozen else self


class Training:
    """One classifier's training. Its state is `state()`; all else follows from protocol, weights and data.

    Args:
        session: the evaluation, whose weights are the start. protocol: of the training.
        index: labelled images to train on. test: to evaluate on after each epoch, called `on` in the metrics.
        journal: of the run. offset: steps of the run's trainings before this one.

    Attributes:
        model: the classifier, on the device. accuracies: top1 and top5 on `test` after each epoch, in [0, 1].
        total_steps: of this training.

    Raises:
        UserError: the journal's saved state does not fit.
    """

    def __init__(
        self,
        session: Session,
        protocol: Protocol,
        index: Index,
        test: Index,
        journal: Journal,
        *,
        on: str = "held out",
        offset: int = 0,
    ) -> None:
        self.session, self.protocol, self.index, self.test = session, protocol, index, test
        self.journal, self.on, self.offset, self.processes = journal, on, offset, session.processes
        saved = journal.take()
        choose_algorithms(self.processes.device, deterministic=False)
        torch.manual_seed(protocol.seed)
        self.model = Classifier(
            copy.deepcopy(session.weights.encoder),
            len(index.classes),
            frozen=protocol.lr_backbone is None,
            bf16=session.bf16,
        ).to(self.processes.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._forward: nn.Module = self.model
        if self.processes.world_size > 1:  # the wrapper averages gradients
            self._forward = DistributedDataParallel(self.model, broadcast_buffers=False, gradient_as_bucket_view=True)
        groups: list[dict[str, Any]] = [{"params": list(self.model.head.parameters())}]
        if protocol.lr_backbone is not None:
            groups.insert(0, {"params": list(self.model.backbone.parameters())})
        self.optimizer = torch.optim.SGD(
            groups, lr=0.0, momentum=MOMENTUM, weight_decay=protocol.weight_decay, fused=True
        )
        self.step = 0
        self.accuracies: list[dict[str, float]] = []
        self._means = Means(("loss", "acc1", "acc5"), self.processes.device)
        self._bad: list[int] = []  # held-out samples, in this process's share
        place = {} if saved is None else loader_place(saved.get("loader"), self.processes, journal.path, len(index))
        self.loader = self._loader(place)
        self.steps_per_epoch = self.loader.steps_per_epoch
        self.total_steps = protocol.epochs * self.steps_per_epoch
        if saved is not None:
            self._load_state(saved)

    def run(self) -> dict[str, float]:
        """Train to the end, and return the last epoch's accuracies.

        Raises:
            Interrupted: by SIGTERM or SIGINT, after the step was finished and a checkpoint written.
            UserError: the loss or the weights were not finite.
        """
        self.loader.bad.on_skip = self.journal.warn
        try:
            self._loop()
        finally:
            self.loader.close()
        return self.accuracies[-1]

    def _loop(self) -> None:
        self.model.train()
        clock = Clock(self.protocol.batch_size)
        while self.step < self.total_steps:
            with clock.waiting():
                batch = next(self.loader)
            self.take_step(batch)
            self.journal.advance(self.offset + self.step)
            clock.count()

            inside = self.step % self.steps_per_epoch
            logging = inside % LOG_EVERY == 0
            if logging:
                self._stop_if_not_finite()
                self.journal.report(self._train_row(clock))
            if inside == 0:
                self.loader.close()  # what it holds is for evaluation to use; it opens again where it was
                self.accuracies.append(self._evaluate())
                self.journal.report(self._row("eval") | self.accuracies[-1] | {"on": self.on})
                clock.restart()
            interrupted = self.journal.remaining() > 0 and self.journal.interrupted(agree=logging)
            if inside == 0 or interrupted:
                self._stop_if_not_finite()
                self.journal.save(self.state())
            if interrupted:
                raise Interrupted(f"stopped by a signal after step {self.journal.step}; go on with --resume auto")

    def take_step(self, batch: Batch) -> None:
        """One optimizer step on a batch. The host does not wait for the device."""
        factor = self.protocol.factor(self.step // self.steps_per_epoch)
        for group, rate in zip(self.optimizer.param_groups, self.protocol.rates.values(), strict=True):
            group["lr"] = rate * factor
        labels = self.loader.labels(batch.samples).to(self.processes.device, non_blocking=True)
        logits = self._forward(batch.views[0])
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._means.add(torch.cat([loss.detach().view(1), right(logits.detach(), labels) / len(labels)]))
        self.step += 1

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it. All processes call it."""
        cuda = self.processes.device.type == "cuda"
        skipped = gather_numbers(self.loader.bad.found, self.processes.device)
        return {
            "step": self.step,
            "loader": {"epoch": self.loader.epoch, "step": self.loader.step, "skipped": skipped},
            "model": self.model.learnt().state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "means": self._means.state_dict(),
            "accuracies": self.accuracies,
            "rng": {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if cuda else None},
        }

    def _load_state(self, state: dict[str, Any]) -> None:
        try:
            self.step, self.accuracies = state["step"], state["accuracies"]
            self.model.learnt().load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            optim.fit_momentum(self.optimizer)
            self._means.load_state_dict(state["means"])
            torch.set_rng_state(state["rng"]["cpu"])
            if state["rng"]["cuda"] is not None and self.processes.device.type == "cuda":
                torch.cuda.set_rng_state(state["rng"]["cuda"])
        except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{self.journal.path}: cannot resume, its state does not fit: {reason}") from error

    def _loader(self, place: dict[str, Any]) -> TrainLoader:
        data = self.session.data
        return TrainLoader(
            self.index,
            batch_size=self.protocol.batch_size,
            image_size=data.image_size,
            recipe=SUPERVISED,
            seed=self.protocol.seed,
            views=1,
            dtype=DTYPES[data.dtype],
            augmentation=data.augmentation,
            device=self.processes.device,
            threads=data.threads,
            prefetch=data.prefetch,
            rank=self.processes.rank,
            world_size=self.processes.world_size,
            on_corrupt=data.on_corrupt,
            **place,
        )

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        """Accuracies on the centre crops of `test`, each image on one process."""
        # Each process has batch norm statistics of its own; the main one's are the model's.
        broadcast_buffers(self.model)
        self.model.eval()
        loader = evaluation_loader(self.session.data, self.processes, self.test, self._bad)
        loader.bad.on_skip = self.journal.warn
        counts = torch.zeros(3, dtype=torch.int64, device=self.processes.device)
        for images, labels in loader:
            assert labels is not None
            counts += F.pad(right(self.model(images), labels), (0, 1), value=len(labels))
        self._bad = loader.bad.found
        self.model.train()
        top1, top5, images_used = reduce_sum(counts).tolist()
        if images_used == 0:
            raise UserError(f"none of the {len(self.test)} images in {self.test.root} ({self.on}) can be used")
        return {"top1": top1 / images_used, "top5": top5 / images_used}

    def _row(self, kind: str) -> dict[str, Any]:
        return {"kind": kind, "step": self.journal.step, "epoch": (self.step - 1) // self.steps_per_epoch}

    def _train_row(self, clock: Clock) -> dict[str, Any]:
        rates = [group["lr"] for group in self.optimizer.param_groups]
        row = self._row("train") | dict(zip(self.protocol.rates, rates, strict=True)) | self._means.read()
        if self.session.data.on_corrupt == "skip":
            skipped = gather_numbers(self.loader.bad.found, self.processes.device)
            row["skipped"] = len({sample for part in skipped for sample in part})
        rate = clock.read()
        remaining = self.journal.remaining() * self.protocol.batch_size / rate["images_per_second"]
        return row | {"timing": rate | {"remaining_seconds": remaining}}

    def _stop_if_not_finite(self) -> None:
        """A step's loss, and what its update made of the weights, which its loss does not see. Waits for the device."""
        norms = torch.stack(torch._foreach_norm(list(self.model.learnt().parameters())))
        if not bool(reduce_sum(self._means.sums).isfinite().all() & norms.isfinite().all()):
            given = " ".join(f"--{name.replace('_', '-')} {rate:g}" for name, rate in self.protocol.rates.items())
            raise UserError(
                f"the loss or the weights are not finite at step {self.journal.step} (epoch "
                f"{(self.step - 1) // self.steps_per_epoch + 1}) with {given}: start anew in another --output with a "
                f"lower rate"
            )


def right(logits: Tensor, labels: Tensor) -> Tensor:
    """How many labels (B,) have the highest of the logits (B, C), and how many one of the five highest: (2,) int64."""
    hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    return torch.stack([hits[:, 0].sum(), hits.sum()])


def check_batch(batch_size: int, images: int, session: Session, what: str) -> None:
    """Refuse batches that the images do not fill or the processes cannot share.

    Raises:
        UserError: naming --batch-size.
    """
    if batch_size % session.processes.world_size:
        raise UserError(f"--batch-size {batch_size}: must be a multiple of {session.processes.world_size} processes")
    if batch_size > images:
        raise UserError(f"--batch-size {batch_size}: {what} has {images} images; lower it to at most {images}")
