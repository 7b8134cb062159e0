"""The training loop. Between logging steps the host never waits for the device."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from synco_fast.config import Config
from synco_fast.data.loader import Batch, TrainLoader
from synco_fast.engine import checkpoints
from synco_fast.engine.agreement import Fingerprint
from synco_fast.engine.collapse import alarm, spread_and_rank
from synco_fast.engine.distributed import Processes, gather_numbers
from synco_fast.engine.metrics import MetricsLog, named
from synco_fast.engine.output import Claim
from synco_fast.engine.probe import KnnProbe
from synco_fast.engine.progress import TrainingProgress
from synco_fast.engine.schedules import learning_rate, scaled
from synco_fast.engine.speed import Speed
from synco_fast.engine.step import TrainStep
from synco_fast.engine.stopping import Stop, agreed
from synco_fast.engine.watchdog import Watchdog
from synco_fast.engine.writer import CheckpointWriter, finish
from synco_fast.errors import Interrupted, UserError
from synco_fast.files import write_text_atomically
from synco_fast.machine import memory_beside_pytorch
from synco_fast.methods import MomentumContrast, negatives_at
from synco_fast.models.encoders import Encoder
from synco_fast.models.shuffle import all_gather_rows


class Trainer:
    """One run: model, optimizer and place. Its state is `state()`; everything else follows from the configuration.

    Args:
        config: of the run. processes: this one among them. contrast: the method.
        speed: how its steps are computed. loader: of this process's share.
        probe: kNN on held-out data, or None. output: folder of the run. data: identity of the data set.
    """

    def __init__(
        self,
        config: Config,
        processes: Processes,
        contrast: MomentumContrast,
        speed: Speed,
        loader: TrainLoader,
        probe: KnnProbe | None,
        output: Path,
        data: dict[str, Any],
    ) -> None:
        self.config, self.processes, self.output, self.data = config, processes, output, data
        self.contrast, self.loader, self.probe = contrast, loader, probe
        self.train_step = TrainStep(config, processes, contrast, speed)
        self.hard = config.negatives.hard()
        self._optim = scaled(config.optim, config.data.batch_size)
        # Of an epoch without bad files. Skipped files make the loader's epochs shorter than that, so `batch.epoch`,
        # which decides on warm-up and stands in the rows, may run a little ahead of what the schedule goes by.
        self.steps_per_epoch = loader.steps_per_epoch
        epochs_steps = config.trainer.epochs * self.steps_per_epoch
        most = config.trainer.max_steps
        self.total_steps = epochs_steps if most is None else min(epochs_steps, most)
        self.step = 0
        # Epoch and samples of each step that the guard was not asked about.
        self._unchecked: dict[int, tuple[int, Tensor]] = {}
        self._stop = Stop(processes, config.trainer.max_hours)
        self._metrics: MetricsLog | None = None
        self._rows: int | None = None  # of metrics, as the checkpoint that this run goes on from has it
        self._writer: CheckpointWriter | None = None
        self._fingerprint, self._checked = Fingerprint(contrast), -1
        self._collapsed = False
        self._watchdog = Watchdog(processes, config.trainer.stall_minutes)
        self._saved_at = time.monotonic()

    def run(self, claim: Claim) -> None:
        """Train to the end, in a folder that this run has a claim to.

        Raises:
            Interrupted: by a signal or trainer.max_hours, after the step was finished and a checkpoint written.
            UserError: the loss or a gradient was not finite, another run took the folder, or the last checkpoint could
                not be written.
        """
        self._claim = claim
        self._progress = progress = TrainingProgress(self.total_steps, self.step, quiet=not self.processes.is_main)
        if self.processes.is_main:
            self._metrics = MetricsLog(self.output, self.step, self._rows, progress.warn)
            self._writer = CheckpointWriter(
                checkpoints.folder(self.output),
                recent=self.config.checkpoint.recent,
                hours=self.config.checkpoint.recent_hours,
                before=(claim.check, self._metrics.sync),
                warn=progress.warn,
            )
        if self.step >= self.total_steps:
            progress.say(f"nothing to do: step {self.step} of {self.total_steps} is done")
        self.loader.bad.on_skip = progress.warn
        if self.probe is not None:
            self.probe.on_skip = progress.warn
        self._watchdog.at("the start", self.step)
        with self._watchdog, self._stop:
            try:
                with self._told():
                    self._loop()
                    self._finish()
            except Interrupted:
                self._close()
                self._stop.tell_launcher()
                raise
            finally:
                self._close()

    def _close(self) -> None:
        """Whatever a run has open; also twice."""
        self._progress.close()
        self.loader.close()
        if self._writer is not None:
            self._writer.wait()
        if self._metrics is not None:
            self._metrics.close()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """`status.json` says how the run is or ended; one that is killed is left at `running`."""
        self._write_status("running")
        try:
            yield
        except Interrupted:
            self._write_status("stopped")
            raise
        except BaseException:
            self._write_status("failed")
            raise
        self._write_status("finished")

    def _write_status(self, status: str) -> None:
        if self.processes.is_main and not self._claim.taken():
            content = {"status": status, "step": self.step, "of": self.total_steps}
            with contextlib.suppress(UserError):  # a disk that is full has other things to tell of
                write_text_atomically(self.output / "status.json", json.dumps(content) + "\n")

    def _loop(self) -> None:
        self._settle()
        clock = Clock(self.config.data.batch_size)
        first = self.step
        if self.total_steps == 0 and self.step == 0:
            self.save()
        while self.step < self.total_steps:
            self._watchdog.at("waiting for data", self.step)
            with clock.waiting():
                batch = next(self.loader)
            self._watchdog.at("training", self.step)
            if self.step == first and self.processes.device.type == "cuda":
                self._progress.say(f"data.gpu_memory: {memory_beside_pytorch(self.processes.device)}")
            self.take_step(batch)
            self._progress.advance(self.step)
            clock.count()

            epoch, inside = divmod(self.step, self.steps_per_epoch)
            last = self.step == self.total_steps
            logging = self.step % self.config.trainer.log_every == 0 or last
            if logging:
                self._check()
                row = self._train_row(batch.epoch, clock)
                self._report(row)
                self._tell_of_collapse(row)
            if self._knn_due(epoch, inside, last):
                assert self.probe is not None
                self._watchdog.at("evaluation", self.step)
                self.loader.close()  # what it holds is for evaluation to use; it opens again where it was
                self._report(self._knn_row(batch.epoch, self.probe))
                clock.restart()
            stop, due = agreed(self.processes, logging, self._stop.asked, logging and self._minutes_are_over())
            if self._checkpoint_due(epoch, inside, last) or stop or due:
                self.save(keep_as_epoch=self._epoch_to_keep(epoch, inside, last))
            if stop and not last:
                self._finish()
                raise Interrupted(f"stopped after step {self.step}; go on with --resume auto")

    def _settle(self) -> None:
        if self.processes.world_size == 1:
            return
        config, device = self.config, self.processes.device
        samples = config.data.batch_size // self.processes.world_size // config.trainer.accumulate
        noise = torch.rand(samples, 3, *2 * (config.data.image_size,), generator=torch.Generator().manual_seed(0))
        self.train_step.settle(noise.to(device, memory_format=torch.channels_last))

    def take_step(self, batch: Batch) -> None:
        """One optimizer step on a batch."""
        self._unchecked[self.step] = batch.epoch, batch.samples
        hard = negatives_at(batch.epoch, self.hard, self.config.negatives.warmup_epochs)
        self._lr = self._learning_rate()
        labels = None
        if self.config.loss.class_oracle:
            labels = self.loader.labels(batch.samples).to(self.processes.device, non_blocking=True)
        self.train_step(batch.views, hard, self.step, self._lr, labels)
        self.step += 1

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds. All processes call it."""
        cuda = self.processes.device.type == "cuda"
        skipped = gather_numbers(self.loader.bad.found, self.processes.device)
        return {
            "config": self.config.model_dump(),
            "step": self.step,
            "data": self.data,
            "loader": {"epoch": self.loader.epoch, "step": self.loader.step, "skipped": skipped},
            "model": self.contrast.state_dict(),
            "optimizer": self.train_step.optimizer.state_dict(),
            "meter": self.train_step.meter.state_dict(),
            "rows": 0 if self._metrics is None else self._metrics.count,
            "guard": self.train_step.guard.state_dict(),
            "rng": {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if cuda else None},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's state; the loader is made for that place by the caller."""
        self.step, self._rows = state["step"], state.get("rows")  # older ones do not say
        self.contrast.load_state_dict(state["model"])
        self.train_step.optimizer.load_state_dict(state["optimizer"])
        self.train_step.meter.load_state_dict(state["meter"])
        self.train_step.guard.load_state_dict(state.get("guard", {"count": 0}))  # older ones stop at the first
        torch.set_rng_state(state["rng"]["cpu"])
        if state["rng"]["cuda"] is not None and self.processes.device.type == "cuda":
            torch.cuda.set_rng_state(state["rng"]["cuda"])

    def save(self, *, keep_as_epoch: int | None = None) -> None:
        """Begin to write a checkpoint of a sound state; all processes call it, the main one writes."""
        self._watchdog.at("writing a checkpoint", self.step)
        self._claim.check_all()
        self._check()
        self._stop_if_weights_overflowed()
        state = self.state()
        if self._writer is not None:
            self._writer.save(state, keep_as_epoch=keep_as_epoch)
        self._saved_at = time.monotonic()
        self._watchdog.at("training", self.step)

    def _finish(self) -> None:
        self._watchdog.at("writing a checkpoint", self.step)
        finish(self._writer, self.processes)

    def _check(self) -> None:
        """That the processes agree, and then that their losses and gradients were finite; once a step."""
        if self._checked < self.step:
            self._fingerprint.check(self.step, self.processes)
            self._stop_if_not_finite()
            self._checked = self.step

    def _minutes_are_over(self) -> bool:
        minutes = self.config.checkpoint.every_minutes
        return self.processes.is_main and minutes is not None and time.monotonic() - self._saved_at > 60 * minutes

    def _learning_rate(self) -> float:
        epoch, inside = divmod(self.step, self.steps_per_epoch)
        return learning_rate(self._optim, self.config.trainer.epochs, epoch, inside, self.steps_per_epoch)

    def _report(self, row: dict[str, Any]) -> None:
        self._progress.report(row)
        if self._metrics is not None:
            self._metrics.write(row)

    def _tell_of_collapse(self, row: dict[str, Any]) -> None:
        """Once, when it begins; keys of the first epoch are not judged."""
        text = alarm(row) if self.step >= self.steps_per_epoch else None
        if text is not None and not self._collapsed:
            self._progress.say(text)
        self._collapsed = text is not None

    def _row(self, kind: str, epoch: int) -> dict[str, Any]:
        return {"kind": kind, "step": self.step, "epoch": epoch}

    def _train_row(self, epoch: int, clock: "Clock") -> dict[str, Any]:
        means = self.train_step.meter.read()
        rate = clock.read()
        remaining = (self.total_steps - self.step) * self.config.data.batch_size / rate["images_per_second"]
        queue = self.contrast.queue
        keys = spread_and_rank(queue.rows, queue.pointer, self.step * self.config.data.batch_size)
        row = self._row("train", epoch) | {"lr": self._lr} | means | keys
        if self.config.data.on_corrupt == "skip":
            skipped = gather_numbers(self.loader.bad.found, self.processes.device)
            row["skipped"] = len({sample for part in skipped for sample in part})
        return row | {"timing": rate | {"remaining_seconds": remaining}}

    def _knn_row(self, epoch: int, probe: KnnProbe) -> dict[str, Any]:
        knn, encoder = self.config.knn, self.contrast.query_encoder
        assert isinstance(encoder, Encoder)
        probe.on_images = lambda images: self._watchdog.still()
        [accuracy], images = probe.measure(encoder, [(knn.k, knn.temperature)])
        return self._row("knn", epoch) | {"accuracy": accuracy, "k": min(knn.k, images["bank"])} | images

    def _knn_due(self, epoch: int, inside: int, last: bool) -> bool:
        every = self.config.knn.every_epochs
        return self.probe is not None and every > 0 and (last or (inside == 0 and epoch % every == 0))

    def _checkpoint_due(self, epoch: int, inside: int, last: bool) -> bool:
        settings = self.config.checkpoint
        by_step = settings.every_steps is not None and self.step % settings.every_steps == 0
        by_epoch = inside == 0 and (epoch % settings.every_epochs == 0 or epoch % settings.keep_every == 0)
        return last or by_step or by_epoch

    def _epoch_to_keep(self, epoch: int, inside: int, last: bool) -> int | None:
        keep = inside == 0 and (last or epoch % self.config.checkpoint.keep_every == 0)
        return epoch if keep else None

    def _stop_if_weights_overflowed(self) -> None:
        """The guard sees a step's loss and gradient, so what its update made of the weights shows one step later."""
        norms = torch._foreach_norm(list(self.contrast.query_encoder.parameters()))
        if not bool(torch.stack(norms).isfinite().all()):
            raise UserError(
                f"the weights are not finite after step {self.step}; no checkpoint was written of them. Start anew in "
                f"another output folder with a lower optim.lr or optim.weight_decay"
            )

    def _stop_if_not_finite(self) -> None:
        """Write down what was found of bad steps since the last look; stop after one too many."""
        guard = self.train_step.guard
        for step, values in guard.found():
            epoch, samples = self._unchecked[step]
            written = self._write_evidence(step, epoch, values, all_gather_rows(samples.to(self.processes.device)))
            bad = f"the loss or a gradient was not finite at step {step} (epoch {epoch})"
            self._progress.say(f"warning: {bad}; {written}")
        self._unchecked.clear()
        if guard.exhausted:
            many = "" if guard.limit == 0 else f", after {guard.limit} such steps that were left out"
            raise UserError(
                f"{bad}{many}; updates were masked from then on; {written}. Start anew in another output folder with a "
                f"lower optim.lr, a higher loss.temperature, or optim.clip_norm"
            )

    def _write_evidence(self, step: int, epoch: int, values: list[float], samples: Tensor) -> str:
        """Write down a bad step; what to say of it."""
        path = self.output / f"nonfinite-step-{step}.json"
        metrics = named(self.train_step.meter.names, values)
        evidence = {"step": step, "epoch": epoch, "metrics": metrics, "files": self.loader.files(samples)}
        try:
            if self.processes.is_main:
                write_text_atomically(path, json.dumps(evidence, indent=1))
        except UserError as error:
            return f"its metrics were {metrics}, and {error}"
        return f"{path} has its metrics and image files"


class Clock:
    """Throughput and the share of time spent waiting for data, since the last reading."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self.restart()

    def restart(self) -> None:
        self._start, self._waited, self._steps = time.perf_counter(), 0.0, 0

    @contextlib.contextmanager
    def waiting(self) -> Any:
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def count(self) -> None:
        self._steps += 1

    def read(self) -> dict[str, float]:
        elapsed = time.perf_counter() - self._start
        rates = {
            "images_per_second": self._steps * self._batch_size / elapsed,
            "data_wait": self._waited / elapsed,
            "seconds": elapsed,
        }
        self.restart()
        return rates
