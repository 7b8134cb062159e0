"""From a configuration to a run: check everything, then build, then write, then train."""

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from synco_fast import __version__
from synco_fast.config import DTYPES, Config
from synco_fast.config_conflicts import check_processes
from synco_fast.config_text import flatten
from synco_fast.data import operator
from synco_fast.data.index import Index, scan
from synco_fast.data.loader import TrainLoader
from synco_fast.data.recipes import RECIPES
from synco_fast.engine import checkpoints, distributed, foreign, optim
from synco_fast.engine import speed as speeds
from synco_fast.engine.agreement import check_start
from synco_fast.engine.distributed import Processes
from synco_fast.engine.output import claimed
from synco_fast.engine.probe import KnnProbe, held_out_like
from synco_fast.engine.trainer import Trainer
from synco_fast.errors import UserError
from synco_fast.files import write_text_atomically
from synco_fast.methods import MomentumContrast
from synco_fast.models.encoders import Encoder
from synco_fast.models.norm import use_split_batch_norm, use_sync_batch_norm
from synco_fast.models.queue import KeyQueue
from synco_fast.ops import backends


def pretrain(config: Config, *, resume: str | None = None) -> None:
    """Run (or go on with) a pretraining run in this process, and leave its results in config.output.

    Args:
        config: checked configuration.
        resume: None to start, "auto" to go on if there is something to go on with, or a checkpoint's path.

    Raises:
        UserError: something given cannot work; nothing has been written unless training had begun.
        Interrupted: see `Trainer.run`.
    """
    with joined(config) as processes:
        trainer = build(config, processes, resume)
        output = Path(config.output)
        claim = claimed(output, processes, f"output = {output}", partial(_write_config, output, config))
        trainer.run(claim)


@contextlib.contextmanager
def joined(config: Config) -> Iterator[Processes]:
    """The processes of a run, this one among them, until its end; that its memory does not suffice is a UserError."""
    advice = (
        f"lower data.batch_size = {config.data.batch_size}, raise trainer.accumulate = {config.trainer.accumulate}, "
        f"set speed.recompute to true, or lower queue.size = {config.queue.size}, model.dim = {config.model.dim} or "
        f"data.image_size = {config.data.image_size}"
    )
    device, stall = distributed.choose_device(config.trainer.device), config.trainer.stall_minutes
    # A stalled process has said where it is before a collective gives up.
    with processes_on(device, advice, None if stall is None else 2 * stall) as processes:
        try:
            yield processes
        except RuntimeError as error:
            if not _in_compiler(error):
                raise
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"torch.compile failed: {reason}; set speed.compile to false to do without it") from error


@contextlib.contextmanager
def processes_on(device: torch.device, advice: str, minutes: float | None = None) -> Iterator[Processes]:
    """The processes of whatever runs on a device, until its end.

    Args:
        advice: what to do where memory runs out. minutes: how long a collective may take; None: torch's default.
    """
    processes = distributed.start(device, minutes)
    try:
        yield processes
    except RuntimeError as error:
        if _out_of_memory(error):
            raise UserError(f"out of memory on {device}: {advice}") from error
        reason = distributed.lost(error)
        if reason is None:
            raise
        place = f"rank {processes.rank} of {processes.world_size}"
        raise UserError(f"{place}: another process was lost, or its answer: {reason}") from error
    finally:
        distributed.stop()


def build(config: Config, processes: Processes, resume: str | None) -> Trainer:
    """Everything of a run, checked and ready to train. Nothing is written."""
    speed = check(config, processes)
    index, output = find_data(config, processes), Path(config.output)
    data = {"samples": len(index), "digest": index.digest}
    path, content = to_go_on_with(output, resume)
    state = theirs = None
    if path is not None:
        if checkpoints.is_ours(content):
            state = checkpoints.checked(content, path)
            checkpoints.check_same_run(state, path, config, data)
        else:
            theirs = _theirs(content, path, config)
    check_start(processes, _facts(config, processes, speed, index, content))

    speeds.choose_algorithms(processes.device, config.trainer.deterministic)
    contrast = speeds.apply(speed, build_contrast(config, processes))
    place = {} if state is None else loader_place(state["loader"], processes, path, len(index))
    if theirs is not None:
        place = {"epoch": theirs.epochs}
    loader = build_loader(config, processes, index, place)
    trainer = Trainer(config, processes, contrast, speed, loader, _probe(config, processes, index), output, data)
    if theirs is not None and path is not None:
        state = _begun(trainer, theirs, path)
    if state is not None and path is not None:
        _load_state(trainer, state, path)
    return trainer


def _write_config(output: Path, config: Config) -> None:
    write_text_atomically(output / "config.yaml", config.to_yaml())


def _facts(
    config: Config, processes: Processes, speed: speeds.Speed, index: Index, content: dict[str, Any]
) -> dict[str, str]:
    """What must be the same for every process of a run."""
    settings = flatten(config.model_dump())
    for place in ("output", "data.root"):
        del settings[place]
    return {
        "synco-fast": __version__,
        "torch": torch.__version__,
        "device": processes.device.type,
        "speed": ", ".join(f"{name} {value}" for name, value in vars(speed).items()),
        "backends of the op": ", ".join(name for name, state in backends().items() if state == "ok"),
        "processes on the host": os.environ.get("LOCAL_WORLD_SIZE", "1"),
        "configuration": hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12],
        "data set": f"{len(index)} images, digest {index.digest[:12]}",
        "checkpoint": f"of step {content['step']}" if "step" in content else "none" if not content else "of others",
    }


def check(config: Config, processes: Processes) -> speeds.Speed:
    """Refuse what cannot work with these processes on this device, data aside; how a step is computed otherwise."""
    check_processes(config, processes.world_size)
    backend = config.loss.backend
    if backend != "auto" and backends()[backend] != "ok":
        raise UserError(f"loss.backend = {backend}: cannot be used here: {backends()[backend]}")
    return speeds.resolve(config, processes)


def find_data(config: Config, processes: Processes) -> Index:
    """The training images; the loader can work here."""
    operator.resolve(config.data.augmentation, processes.device)
    if config.data.root is None:
        raise UserError("data.root is not set: give the images with --data DIR or --set data.root=DIR")
    index = scan(Path(config.data.root))
    if config.loss.class_oracle and index.labels is None:
        raise UserError(
            f"loss.class_oracle = true: needs labelled data, and {config.data.root} has no classes; give class folders "
            f"(data.md), or set it to false"
        )
    return index


def build_contrast(config: Config, processes: Processes) -> MomentumContrast:
    """Encoders and queue, the same on every process: their random start comes from the seed alone."""
    device = processes.device
    torch.manual_seed(config.seed)
    query_encoder, key_encoder = build_encoder(config, device), build_encoder(config, device)
    queue = KeyQueue(
        config.queue.size,
        config.model.dim,
        DTYPES[config.queue.dtype],
        torch.Generator().manual_seed(config.seed),
        labelled=config.loss.class_oracle,
    )
    contrast = MomentumContrast(
        query_encoder,
        key_encoder,
        queue,
        temperature=config.loss.temperature,
        seed=config.seed,
        batch_norm=config.bn.mode,
        backend=config.loss.backend,
    )
    return contrast.to(device)


def build_encoder(config: Config, device: torch.device) -> torch.nn.Module:
    """One encoder with the configured batch norm, at a random start."""
    model = config.model
    encoder = Encoder(model.arch, stem=model.stem, dim=model.dim, mlp=model.mlp)
    if config.bn.mode == "split":
        use_split_batch_norm(encoder, config.bn.group_size)
    elif config.bn.mode == "sync":
        return use_sync_batch_norm(encoder, device)
    return encoder


def build_loader(config: Config, processes: Processes, index: Index, place: dict[str, Any]) -> TrainLoader:
    """This process's share of the training data, from a place (epoch, step, skipped) on, or {} for the start."""
    data = config.data
    return TrainLoader(
        index,
        batch_size=data.batch_size,
        image_size=data.image_size,
        recipe=RECIPES[data.recipe],
        seed=config.seed,
        dtype=DTYPES[data.dtype],
        augmentation=data.augmentation,
        device=processes.device,
        threads=data.threads,
        prefetch=data.prefetch,
        rank=processes.rank,
        world_size=processes.world_size,
        on_corrupt=data.on_corrupt,
        **place,
    )


def loader_place(saved: Any, processes: Processes, path: Path | None, samples: int) -> dict[str, Any]:
    """Place and skipped samples of this process's loader. With another number of processes, all know all of them.

    Raises:
        UserError: what was saved is no place in a data set of so many samples.
    """
    try:
        lists = [[int(sample) for sample in part] for part in saved["skipped"]]
        known = lists[processes.rank : processes.rank + 1] if len(lists) == processes.world_size else lists
        skipped = list(dict.fromkeys(sample for part in known for sample in part))
        epoch, step = int(saved["epoch"]), int(saved["step"])
        if min(epoch, step, *skipped, 0) < 0 or max(skipped, default=0) >= samples:
            raise ValueError("numbers out of range")
        return {"epoch": epoch, "step": step, "skipped": skipped}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: cannot resume, its place in the data is not readable: {error!r}") from error


def _probe(config: Config, processes: Processes, index: Index) -> KnnProbe | None:
    if config.knn.every_epochs == 0:
        return None
    assert config.data.root is not None
    try:
        test = held_out_like(index, Path(config.data.root))
    except UserError as error:
        raise UserError(
            f"knn.every_epochs = {config.knn.every_epochs}: {error}; set it to 0 to train without kNN"
        ) from error
    return KnnProbe(config.data, processes, index, test, bf16=config.trainer.precision == "bf16")


def to_go_on_with(
    output: Path, resume: str | None, option: str = "--set output=DIR"
) -> tuple[Path | None, dict[str, Any]]:
    """The checkpoint that `--resume` means, or None to start, and what it holds; `option` names another output folder.

    Raises:
        UserError: the folder holds a run that would be replaced; or no checkpoint can be read.
    """
    if resume is None:
        if checkpoints.in_folder(output):
            raise UserError(f"{output} already holds a run: go on with --resume auto, or choose another {option}")
        return None, {}
    if resume == "auto":
        return checkpoints.newest(output, lambda text: print(text, file=sys.stderr, flush=True)) or (None, {})
    if checkpoints.in_folder(output) and Path(resume).resolve().parent != checkpoints.folder(output).resolve():
        raise UserError(
            f"{output} already holds another run than {resume}, which would replace it; choose another {option}"
        )
    return Path(resume), checkpoints.read(Path(resume))


def _theirs(content: dict[str, Any], path: Path, config: Config) -> foreign.Foreign:
    """What another project's checkpoint holds; it starts a run, and so takes no run's place."""
    if checkpoints.in_folder(Path(config.output)):
        raise UserError(
            f"{path}: not a checkpoint of synco-fast, and {config.output} already holds a run, which a checkpoint of "
            f"others would replace; choose another --set output=DIR"
        )
    return foreign.read(content, path, config)


def _begun(trainer: Trainer, theirs: foreign.Foreign, path: Path) -> dict[str, Any]:
    """The state of this run as it would be had it been theirs, and a word about what it cannot know.

    Raises:
        UserError: that run would already be at its end, and so would leave nothing.
    """
    step = theirs.epochs * trainer.steps_per_epoch
    if step >= max(1, trainer.total_steps):
        raise UserError(
            f"{path}: nothing is left to train: its {theirs.epochs} epochs are {step} steps, and trainer.max_steps = "
            f"{trainer.config.trainer.max_steps}; raise it, or set it to null"
        )
    if trainer.processes.is_main:
        for note in theirs.notes(path, step):
            print(note, file=sys.stderr, flush=True)
    parameters = [name for name, _ in trainer.contrast.query_encoder.named_parameters()]
    return theirs.state(trainer.state(), parameters, step)


def _load_state(trainer: Trainer, state: dict[str, Any], path: Path) -> None:
    try:
        trainer.load_state(state)
        optim.fit_momentum(trainer.train_step.optimizer)
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: cannot resume, its state does not fit this model: {reason}") from error


def _in_compiler(error: RuntimeError) -> bool:
    """By name: to import the compiler's exceptions is to import the compiler."""
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))


def _out_of_memory(error: RuntimeError) -> bool:
    """torch has a class for it on GPUs only, and DALI has none."""
    words = ("can't allocate memory", "bad_alloc", "cudaErrorMemoryAllocation")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)
