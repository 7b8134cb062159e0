"""Going on with pretraining that others began: from a checkpoint of MoCo, SynCo or MoCHi to a state of ours."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from synco_fast.config import DTYPES, Config
from synco_fast.config_text import listing
from synco_fast.engine.weights import build, head_of, momentum_pair, tensors_of
from synco_fast.errors import UserError
from synco_fast.models.recognise import recognise

_UNIT = 2**-8
"""A row this close to length 1 stays as it is: bfloat16 moves an entry by 2^-9 of it at most, so unit rows remain."""

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True, eq=False)
class Foreign:
    """What somebody else's pretraining checkpoint holds, by our names.

    Attributes:
        epochs: completed. model: state of `MomentumContrast`.
        momentum: of the query encoder's parameters, by the names that `Encoder` gives them; empty: there is none that
            this run's optimizer could use.
    """

    epochs: int
    model: dict[str, Tensor]
    momentum: dict[str, Tensor]

    def state(self, fresh: dict[str, Any], parameters: list[str], step: int) -> dict[str, Any]:
        """The state of a run that has come so far.

        Args:
            fresh: state of the run before its first step. parameters: names of those its optimizer has, in its order.
            step: number of steps taken.
        """
        kept = {i: {"momentum_buffer": self.momentum[name]} for i, name in enumerate(parameters) if self.momentum}
        return {**fresh, "step": step, "model": self.model, "optimizer": {**fresh["optimizer"], "state": kept}}

    def notes(self, path: Path, step: int) -> list[str]:
        """What a person who goes on from it should know, as lines."""
        lines = [
            f"{path}: going on after its epoch {self.epochs}, as step {step} of this configuration; images are ordered "
            f"and negatives drawn by this run's seed, for theirs is not in the file"
        ]
        if not self.momentum:
            lines.append(f"{path}: momentum starts from 0: none is in it that this optimizer could use")
        if "queue.labels" in self.model:
            lines.append(
                f"{path}: no classes of its queue's rows in it; until the queue has been filled anew, the class oracle "
                f"leaves none of them out"
            )
        return lines


def read(content: Mapping[str, Any], path: Path, config: Config) -> Foreign:
    """Take apart what was read from a checkpoint that is not ours: {epoch, state_dict, optimizer}, as MoCo writes it.

    Raises:
        UserError: it is no such checkpoint, is damaged, or was made under other keys than those configured.
    """
    try:
        return _read(content, config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: cannot resume, it is not what MoCo writes: {reason}") from error


def _read(content: Mapping[str, Any], config: Config) -> Foreign:
    tensors = tensors_of(content)
    query, key = _pair(content, tensors)
    prefix = query.removesuffix("encoder_q.")
    built, model = _encoders(tensors, query, key)
    rows = _rows(tensors[f"{prefix}queue"], built["dim"])
    _check_agrees(built, len(rows), config)
    if content["epoch"] >= config.trainer.epochs:
        raise UserError(
            f"nothing is left to train: it has completed {content['epoch']} epochs, and trainer.epochs = "
            f"{config.trainer.epochs}, which counts them; raise it (knn and export take the file as it is)"
        )
    model["queue.rows"] = rows.to(DTYPES[config.queue.dtype])
    model["queue.pointer"] = _pointer(tensors[f"{prefix}queue_ptr"], len(rows))
    if config.loss.class_oracle:
        model["queue.labels"] = torch.full((len(rows),), -1)  # of no class, as a queue's rows at a run's start
    wrong = [name for name, value in model.items() if not bool(value.isfinite().all())]
    if wrong:
        raise UserError(f"cannot resume, {wrong[0]} of it is not finite")
    # LARS sums gradients that it has scaled, and MoCo's SGD has not.
    kept = config.optim.momentum > 0 and config.optim.name == "sgd"
    momentum = _momentum(content.get("optimizer"), tensors, query, key) if kept else {}
    momentum = {_our_name(name): value for name, value in momentum.items()}
    return Foreign(content["epoch"], model, momentum)


def _pair(content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[str, str]:
    """Prefixes of the query and the key encoder of a pretraining checkpoint that has all that it takes to go on."""
    try:
        query, key = momentum_pair(tensors)
        if "encoder_q." not in query or key is None:
            raise UserError("it holds weights alone, no encoder_q with its encoder_k (knn and export take those)")
        prefix = query.removesuffix("encoder_q.")
        lacks = [name for name in (f"{prefix}queue", f"{prefix}queue_ptr") if name not in tensors]
        if type(content.get("epoch")) is not int or content["epoch"] < 0:
            lacks.append("epoch, the number of epochs completed")
        if lacks:
            raise UserError(f"it lacks {', '.join(lacks)}")
    except UserError as error:
        raise UserError(
            f"not a checkpoint of synco-fast, which has config, model and meter, nor a pretraining checkpoint of MoCo, "
            f"SynCo or MoCHi: {error}"
        ) from error
    return query, key


def _encoders(tensors: Mapping[str, Tensor], query: str, key: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """How both encoders are built, as arguments of `Encoder`, and their tensors by the names of `MomentumContrast`."""
    states: dict[str, Tensor] = {}
    kinds = []
    for ours, prefix in (("query_encoder.", query), ("key_encoder.", key)):
        found = recognise(tensors, prefix)
        head, head_tensors = head_of(found)
        if head["dim"] is None:
            raise UserError(f"cannot resume, {prefix}fc, the projection head, is not in it")
        encoder, built = build(found, head, head_tensors)
        states |= {f"{ours}{name}": value for name, value in encoder.state_dict().items()}
        kinds.append(built)
    if kinds[0] != kinds[1]:
        raise UserError(f"cannot resume, its encoders differ: {kinds[0]} and {kinds[1]}")
    return kinds[0], states


def _rows(queue: Tensor, dim: int) -> Tensor:
    """Unit rows (K, D) of MoCo's queue (D, K) or SynCo's (K, D). SynCo's rows start shorter than 1."""
    if queue.ndim != 2 or dim not in queue.shape:
        raise UserError(f"cannot resume, its queue is {list(queue.shape)}, expected [{dim}, K] or [K, {dim}]")
    queue = queue.float()
    transposed = queue.shape[0] == dim
    if queue.shape[1] == dim:
        transposed = transposed and (_unit(queue.T) or not _unit(queue))
    rows = (queue.T if transposed else queue).contiguous()
    lengths = rows.norm(dim=1, keepdim=True)
    wrong = (~(lengths.isfinite() & (lengths > 0))).flatten().nonzero().flatten().tolist()
    if wrong:
        raise UserError(f"cannot resume, {len(wrong)} rows of its queue are 0 or not finite, row {wrong[0]} among them")
    return torch.where((lengths - 1).abs() <= _UNIT, rows, rows / lengths)


def _unit(rows: Tensor) -> bool:
    return bool(((rows.norm(dim=1) - 1).abs() <= _UNIT).all())


def _pointer(pointer: Tensor, size: int) -> Tensor:
    place = int(pointer)
    if pointer.is_floating_point() or not 0 <= place < size:
        raise UserError(f"cannot resume, its queue_ptr is {place}, expected a row of its queue, 0 to {size - 1}")
    return torch.tensor(place)


def _check_agrees(built: dict[str, Any], size: int, config: Config) -> None:
    theirs = {f"model.{key}": value for key, value in built.items()} | {"queue.size": size}
    ours = {f"model.{key}": getattr(config.model, key) for key in built} | {"queue.size": config.queue.size}
    differ = [f"{key} is {ours[key]!r}, was {theirs[key]!r}" for key in theirs if ours[key] != theirs[key]]
    if differ:
        raise listing("cannot resume, it was made under another configuration", differ)


def _momentum(optimizer: Any, tensors: Mapping[str, Tensor], query: str, key: str) -> dict[str, Tensor]:
    """Momentum buffers of the query encoder's parameters, by their names without prefix.

    An optimizer numbers its parameters. MoCo gives it all of the model's, in the order of the state dict, and only the
    query encoder's learn.
    """
    if optimizer is None:
        return {}
    if len(optimizer["param_groups"]) != 1:
        raise UserError("cannot resume, its optimizer has several groups of parameters, whose order is not known")
    numbers = optimizer["param_groups"][0]["params"]
    names = [name for name in tensors if name.startswith((query, key)) and not name.endswith(_BUFFERS)]
    learnt = [name for name in names if name.startswith(query)]
    if len(numbers) == len(learnt):
        names = learnt
    if len(numbers) != len(names):
        raise UserError(f"cannot resume, its optimizer has {len(numbers)} parameters, and its model {len(names)}")
    states = {name: optimizer["state"][i] for i, name in zip(numbers, names, strict=True) if i in optimizer["state"]}
    buffers = {name: state["momentum_buffer"] for name, state in states.items() if name in learnt}
    buffers = {name: buffer for name, buffer in buffers.items() if buffer is not None}
    wrong = [name for name in learnt if name not in buffers or buffers[name].shape != tensors[name].shape]
    wrong = wrong or [name for name, buffer in buffers.items() if not bool(buffer.isfinite().all())]
    if buffers and wrong:
        raise UserError(f"cannot resume, its optimizer has no finite momentum of the shape of {wrong[0]}")
    return {name.removeprefix(query): buffer for name, buffer in buffers.items()}


def _our_name(name: str) -> str:
    """The name in `Encoder` of a parameter of MoCo's encoder."""
    if name.startswith("fc."):
        return re.sub(r"^fc\.(\d+\.)?", lambda found: f"head.{found[1] or '0.'}", name)
    return f"backbone.{name}"
