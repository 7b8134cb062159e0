"""`synco-fast export`: a checkpoint's encoder in the format of another library."""

import io
import json
import os
import pickle
import re
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from synco_fast.data.recipes import IMAGENET_MEAN, IMAGENET_STD
from synco_fast.engine.distributed import Processes
from synco_fast.engine.weights import Weights, load_weights, metadata
from synco_fast.errors import UserError
from synco_fast.evaluation.session import about
from synco_fast.files import sha256, write_atomically, write_text_atomically
from synco_fast.models.encoders import NARROW

_DETECTRON2_DEPTHS = {"resnet50": 50, "resnet101": 101, "resnet152": 152}


@dataclass(frozen=True)
class Format:
    """A format of weights.

    Attributes:
        suffix: of its files. refused: why an encoder has no place in it, or None.
        tensors: what a file holds, by name. encoded: the file's bytes. load: a line that loads it.
    """

    suffix: str
    refused: Callable[[Weights], str | None]
    tensors: Callable[[Weights], dict[str, Tensor]]
    encoded: Callable[[Weights, dict[str, Tensor]], bytes]
    load: Callable[[Weights, Path], str]


def export(checkpoint: Path, out: Path, form: str) -> dict[str, Any]:
    """Write the query encoder of a checkpoint to `out`, and beside it, with `.json` appended, what it is.

    Args:
        checkpoint: see `load_weights`. out: must not be there yet. form: a name in FORMATS.

    Returns:
        What the JSON file holds; `load` is the line that loads the weights.

    Raises:
        UserError: the checkpoint cannot be read, has no place in the format, or `out` cannot be written; nothing has
            been written.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("export: under torchrun, each of its processes would write the file; start it without")
    started = time.time()
    described = _checked(out, form)
    _say(f"reading {checkpoint}")
    weights = load_weights(checkpoint)
    reason = FORMATS[form].refused(weights)
    if reason is not None:
        raise UserError(f"{checkpoint}: cannot be exported as {form}: {reason}")
    tensors = FORMATS[form].tensors(weights)
    _say(f"writing {out}")
    content = FORMATS[form].encoded(weights, tensors)
    write_atomically(out, lambda file: file.write(content))
    learnt = weights.encoder.parameters() if form == "safetensors" else weights.encoder.backbone.parameters()
    result = {
        "command": "export",
        "metrics": {},
        "settings": {"format": form},
        "weights": weights.about,
        "file": {
            "path": str(out),
            "sha256": sha256(out),
            "tensors": len(tensors),
            "parameters": sum(parameter.numel() for parameter in learnt),
        },
        "preprocessing": {
            "colours": "RGB in [0, 1]",
            "resize": weights.data.eval_resize,
            "interpolation": "bilinear",
            "image_size": weights.data.image_size,
            "mean": IMAGENET_MEAN,
            "std": IMAGENET_STD,
        },
        "load": FORMATS[form].load(weights, out),
        "about": about(Processes(0, 1, torch.device("cpu")), "fp32", started),
    }
    try:
        write_text_atomically(described, json.dumps(result, indent=1, allow_nan=False))
    except UserError:
        out.unlink(missing_ok=True)  # which would be in the way of another try
        raise
    return result


def _checked(out: Path, form: str) -> Path:
    """Where the description of `out` goes; both can be written, as far as can be told."""
    suffix = FORMATS[form].suffix
    if out.suffix != suffix:
        raise UserError(f"{out}: a file of format {form} ends in {suffix}; name it so, as in encoder{suffix}")
    described = out.with_name(f"{out.name}.json")
    for path in (out, described):
        try:
            there = path.exists()
        except OSError as error:
            raise UserError(f"{path}: cannot write it: {error.strerror}") from error
        if there:
            raise UserError(f"{path}: is there already; name another file, or move it away")
    if not out.absolute().parent.is_dir():
        raise UserError(f"{out}: there is no folder {out.parent}; make it, or name another")
    return described


def _say(what: str) -> None:
    print(f"export: {what}", file=sys.stderr, flush=True)


def _backbone(weights: Weights) -> dict[str, Tensor]:
    return weights.encoder.backbone.state_dict()


def _not_torchvisions(weights: Weights) -> str | None:
    """Why the networks of torchvision and timm have no place for the backbone, or None."""
    if weights.built["arch"] == NARROW:
        return f"neither torchvision nor timm has {NARROW}; use --format safetensors"
    if weights.built["stem"] == "cifar":
        arch = weights.built["arch"]
        return f"it has the cifar stem, a 3x3 conv1, and the {arch} of torchvision and timm a 7x7; use safetensors"
    return None


def _torch_saved(weights: Weights, tensors: dict[str, Tensor]) -> bytes:
    content = io.BytesIO()
    torch.save(tensors, content)
    return content.getvalue()


def _to_torchvision(weights: Weights, out: Path) -> str:
    arch = weights.built["arch"]
    return (
        f"model = torchvision.models.{arch}(); model.fc = torch.nn.Identity(); "
        f"model.load_state_dict(torch.load({str(out)!r}))"
    )


def _to_timm(weights: Weights, out: Path) -> str:
    return f"model = timm.create_model({weights.built['arch']!r}, num_classes=0, checkpoint_path={str(out)!r})"


def _to_encoder(weights: Weights, out: Path) -> str:
    return f"encoder = synco_fast.engine.weights.load_weights(pathlib.Path({str(out)!r})).encoder"


def _not_detectron2s(weights: Weights) -> str | None:
    arch, stem = weights.built["arch"], weights.built["stem"]
    if arch in _DETECTRON2_DEPTHS and stem == "imagenet":
        return None
    what = f"{arch} with the cifar stem" if arch in _DETECTRON2_DEPTHS else arch
    return f"it is {what}, expected one of {', '.join(_DETECTRON2_DEPTHS)} with the imagenet stem"


def _named_by_detectron2(weights: Weights) -> dict[str, Tensor]:
    return {detectron2_name(name): value for name, value in _backbone(weights).items()}


def detectron2_name(name: str) -> str:
    """A name of torchvision's ResNet, as detectron2's bottleneck ResNet has it: the same tensor."""
    stage = re.match(r"layer(\d)\.", name)
    name = f"res{int(stage[1]) + 1}.{name[stage.end() :]}" if stage else f"stem.{name}"
    name = name.replace(".downsample.0.", ".shortcut.").replace(".downsample.1.", ".shortcut.norm.")
    return re.sub(r"\.bn(\d)\.", r".conv\1.norm.", name)


def _pickled(weights: Weights, tensors: dict[str, Tensor]) -> bytes:
    """What detectron2's model zoo holds: it matches such names against those of whatever model is built."""
    content = io.BytesIO()
    arrays = {name: value.numpy() for name, value in tensors.items()}
    _ArrayPickler(content, protocol=3).dump({"model": arrays, "__author__": "synco_fast", "matching_heuristics": True})
    return content.getvalue()


class _ArrayPickler(pickle.Pickler):
    """Pickles arrays for any numpy: its own way names a module that numpy 1 does not have."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return np.ndarray, (value.shape, value.dtype.str, bytearray(value.tobytes()))
        return NotImplemented


def _to_detectron2(weights: Weights, out: Path) -> str:
    mean, std = (str([round(255 * value, 3) for value in values]) for values in (IMAGENET_MEAN, IMAGENET_STD))
    settings = {
        "MODEL.WEIGHTS": str(out),
        "MODEL.RESNETS.DEPTH": str(_DETECTRON2_DEPTHS[weights.built["arch"]]),
        "MODEL.RESNETS.STRIDE_IN_1X1": "False",
        "INPUT.FORMAT": "RGB",
        "MODEL.PIXEL_MEAN": mean,
        "MODEL.PIXEL_STD": std,
    }
    return shlex.join([word for setting in settings.items() for word in setting])


FORMATS = {
    "torchvision": Format(".pth", _not_torchvisions, _backbone, _torch_saved, _to_torchvision),
    "timm": Format(
        ".safetensors", _not_torchvisions, _backbone, lambda weights, tensors: safetensors.torch.save(tensors), _to_timm
    ),
    "safetensors": Format(
        ".safetensors",
        lambda weights: None,
        lambda weights: weights.encoder.state_dict(),
        lambda weights, tensors: safetensors.torch.save(tensors, metadata(weights)),
        _to_encoder,
    ),
    "detectron2": Format(".pkl", _not_detectron2s, _named_by_detectron2, _pickled, _to_detectron2),
}
