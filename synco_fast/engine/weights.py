"""An encoder's weights, from a checkpoint of ours or of others: what every evaluation and export starts from."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors
import safetensors.torch
import torch
from pydantic import Field, ValidationError
from torch import Tensor

from synco_fast.config import COUNT_MAX, AboveZero, Config, Count, Data, Section
from synco_fast.data.recipes import IMAGENET_MEAN, IMAGENET_STD
from synco_fast.engine import checkpoints
from synco_fast.errors import UserError
from synco_fast.files import sha256
from synco_fast.models.encoders import Encoder
from synco_fast.models.recognise import Found, prefixes, recognise
from synco_fast.ops import HardNegatives

METADATA = "synco_fast"
"""Where in a safetensors file's metadata an export says how its encoder is built, as JSON."""

_PREPARED = ("image_size", "eval_resize", "dtype")  # of Data: what features depend on
_PROGRESS = ("method", "step", "epoch", "seed")  # of Weights.about, where known


class _Built(Section):
    """Arguments of `Encoder`, whose defaults hold for those left out."""

    arch: str
    stem: Literal["imagenet", "cifar"] = "imagenet"
    dim: Annotated[int, Field(ge=1, le=COUNT_MAX)] | None = 128
    mlp: bool = True


class _Described(Section):
    """What `metadata` writes."""

    built: _Built
    data: Data
    temperature: AboveZero | None
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    method: str = ""
    step: Count = 0
    epoch: Count = 0
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    def check(self) -> None:
        """Refuse, as a ValueError, what cannot be done with images, or is not done here."""
        resize, size = self.data.eval_resize, self.data.image_size
        if resize < size:
            raise ValueError(f"data.eval_resize = {resize}: must be at least data.image_size = {size}")
        if (self.mean, self.std) != (IMAGENET_MEAN, IMAGENET_STD):
            raise ValueError(f"mean = {self.mean}, std = {self.std}: expected {IMAGENET_MEAN} and {IMAGENET_STD}")


@dataclass(frozen=True, eq=False)
class Weights:
    """An encoder as a file has it, on the CPU.

    Attributes:
        encoder: the query encoder; without a head where the file has none.
        key_encoder: the encoder of keys that followed it, if the file has one.
        built: how the encoder is built, arguments of `Encoder`.
        data: how images are prepared for it.
        temperature: t of its training, if the file tells.
        about: what a result says of it, as JSON: path, SHA-256 of the file, kind of file, architecture, progress.
        negatives: the synthetic negatives of its training, if the file tells; `none` says that there were none.
    """

    encoder: Encoder
    key_encoder: Encoder | None
    built: dict[str, Any]
    data: Data
    temperature: float | None
    about: dict[str, Any]
    negatives: HardNegatives | None = None


def load_weights(path: Path) -> Weights:
    """Read a checkpoint of a run, a .pth.tar of MoCo v1, v2, SynCo or MoCHi, a torchvision state dict, or safetensors.

    Nothing in the file is run. Names may have any prefix (`module.`, `encoder_q.`); the architecture is recognised.

    Raises:
        UserError: not there, damaged, holds more than tensors and plain values, no encoder known here, or not finite.
    """
    if path.suffix == ".safetensors":
        weights = _from_safetensors(path)
    else:
        content = checkpoints.read(path)
        weights = _from_run(content, path) if checkpoints.is_ours(content) else _from_others(content, path)
    wrong = [name for name, value in weights.encoder.state_dict().items() if not bool(value.isfinite().all())]
    if wrong:
        raise UserError(f"{path}: its weights are not finite: {len(wrong)} tensors, {wrong[0]} among them")
    return weights


def query_encoder(state: dict[str, Any], config: Config) -> Encoder:
    """The query encoder of a run's state, on the CPU. In evaluation all batch norm modes are plain batch norm."""
    return _encoder_of(state, config, "query_encoder.")


def metadata(weights: Weights) -> dict[str, str]:
    """Metadata of a safetensors file with an encoder's tensors, from which `load_weights` builds the encoder again."""
    described = {
        "built": weights.built,
        "data": {name: getattr(weights.data, name) for name in _PREPARED},
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "temperature": weights.temperature,
        **{name: weights.about[name] for name in _PROGRESS if name in weights.about},
    }
    return {"format": "pt", METADATA: json.dumps(described)}


def tensors_of(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors with a name in somebody's checkpoint: in its `state_dict` or `model`, or itself."""
    for name in ("state_dict", "model"):
        if isinstance(content.get(name), Mapping):
            content = content[name]
            break
    return {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}


def momentum_pair(tensors: Mapping[str, Tensor]) -> tuple[str, str | None]:
    """Prefixes of the query encoder and, if there is one, of the key encoder, as MoCo names them, or of the only one.

    Raises:
        UserError: there is no encoder, or there are several and nothing says which is meant.
    """
    found = prefixes(tensors)
    if not found:
        raise UserError("it has no residual network: no conv1.weight that reads images of 3 channels")
    keys = [prefix for prefix in found if "encoder_k." in prefix]
    others = [prefix for prefix in found if prefix not in keys]
    queries = [prefix for prefix in others if "encoder_q." in prefix] or others
    if len(queries) != 1:
        raise UserError(f"it has several encoders, and none is encoder_q: {', '.join(map(repr, found))}")
    return queries[0], keys[0] if keys else None


def head_of(found: Found) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """How the projection head of a momentum-contrast encoder is built, and its tensors by the names of `Encoder.head`.

    MoCo's heads take the place of torchvision's `fc`: one linear layer (v1), or `fc.0`, ReLU and `fc.2` (v2).
    """
    rest = found.rest
    if {"fc.0.weight", "fc.2.weight"} <= rest.keys():
        names = {f"{i}.{kind}": f"fc.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    elif "fc.weight" in rest:
        names = {f"0.{kind}": f"fc.{kind}" for kind in ("weight", "bias")}
    else:
        return {"dim": None}, {}
    missing = [name for name in names.values() if name not in rest]
    if missing:
        raise UserError(f"its head lacks {', '.join(missing)}")
    head = {ours: rest[theirs] for ours, theirs in names.items()}
    last = head["2.weight" if len(names) == 4 else "0.weight"]
    if last.ndim != 2:
        raise UserError(f"its head's last weight is {list(last.shape)}, expected 2 dimensions")
    return {"dim": last.shape[0], "mlp": len(names) == 4}, head


def build(found: Found, head: dict[str, Any], head_tensors: dict[str, Tensor]) -> tuple[Encoder, dict[str, Any]]:
    """The encoder that was found, with its weights, and the arguments of `Encoder` that give one like it."""
    built = {"arch": found.arch, "stem": found.stem, **head}
    state = {f"backbone.{name}": value for name, value in found.backbone.items()}
    state |= {f"head.{name}": value for name, value in head_tensors.items()}
    return _filled(built, state), built


def _filled(built: dict[str, Any], state: dict[str, Tensor]) -> Encoder:
    """An encoder with these tensors, of which counters of batches may be missing.

    Raises:
        ValueError: they are not its tensors, by name or shape. Nothing of a size that they do not have is allocated.
    """
    with torch.device("meta"):
        expected = Encoder(**built).state_dict()
    for name in sorted(expected.keys() | state.keys()):
        want, have = (str(list(found[name].shape)) if name in found else "missing" for found in (expected, state))
        if want != have and not (have == "missing" and name.endswith("num_batches_tracked")):
            raise ValueError(f"tensor {name} is {have}, expected {want.replace('missing', 'none of that name')}")
    encoder = Encoder(**built)
    encoder.load_state_dict({**encoder.state_dict(), **state})
    return encoder


def _from_run(content: dict[str, Any], path: Path) -> Weights:
    state = checkpoints.checked(content, path)
    config = checkpoints.saved_config(state, path)
    try:
        encoder, key_encoder = (_encoder_of(state, config, prefix) for prefix in ("query_encoder.", "key_encoder."))
    except (AttributeError, RuntimeError, ValueError) as error:
        raise _unfit(path, error) from error
    about = _about(path, "synco-fast checkpoint", config.model.arch, encoder)
    return Weights(
        encoder,
        key_encoder,
        _built_by(config),
        config.data,
        config.loss.temperature,
        about | {"method": config.method, "step": state["step"], "seed": config.seed},
        config.negatives.hard(),
    )


def _encoder_of(state: dict[str, Any], config: Config, prefix: str) -> Encoder:
    tensors = {name.removeprefix(prefix): value for name, value in state["model"].items() if name.startswith(prefix)}
    return _filled(_built_by(config), tensors)


def _built_by(config: Config) -> dict[str, Any]:
    return {name: getattr(config.model, name) for name in ("arch", "stem", "dim", "mlp")}


def _from_others(content: dict[str, Any], path: Path) -> Weights:
    tensors = tensors_of(content)
    try:
        query, key = momentum_pair(tensors)
        found = recognise(tensors, query)
        # Elsewhere `fc` is a classifier's.
        contrast = key is not None or "encoder_q." in query
        head, head_tensors = head_of(found) if contrast else ({"dim": None}, {})
        encoder, built = build(found, head, head_tensors)
        key_encoder = None
        if key is not None:
            found_key = recognise(tensors, key)
            key_encoder, _ = build(found_key, *head_of(found_key))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (RuntimeError, ValueError) as error:
        raise _unfit(path, error) from error
    kind = "MoCo-style checkpoint" if contrast else "state dict"
    about = _about(path, kind, found.arch, encoder)
    epoch = content.get("epoch")
    if type(epoch) is int and 0 <= epoch <= COUNT_MAX:
        about["epoch"] = epoch
    return Weights(encoder, key_encoder, built, Data(), None, about)


def _from_safetensors(path: Path) -> Weights:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            described = (file.metadata() or {}).get(METADATA)
        tensors = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(f"{path}: not a readable safetensors file: {reason}") from error
    if described is None:
        return _from_others(dict(tensors), path)
    try:
        found = _Described.model_validate_json(described)
        found.check()
        built = found.built.model_dump(exclude_unset=True)
        encoder = _filled(built, tensors)
    except ValidationError as error:
        reasons = (f"{'.'.join(map(str, item['loc'])) or METADATA}: {item['msg']}" for item in error.errors())
        raise _unfit(path, ValueError("; ".join(reasons))) from error
    except (ValueError, RuntimeError, UserError) as error:
        raise _unfit(path, error) from error
    about = _about(path, "safetensors export", built["arch"], encoder)
    about |= found.model_dump(include=set(_PROGRESS), exclude_unset=True)
    return Weights(encoder, None, built, found.data, found.temperature, about)


def _about(path: Path, kind: str, arch: str, encoder: Encoder) -> dict[str, Any]:
    return {"path": str(path), "sha256": sha256(path), "kind": kind, "arch": arch, "features": encoder.width}


def _unfit(path: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:300]
    return UserError(f"{path}: its weights do not fit its own description: {reason}")
