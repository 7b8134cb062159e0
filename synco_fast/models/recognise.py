"""Which encoder a file's tensors belong to: from their names and shapes, whatever stands before the names."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from synco_fast.errors import UserError
from synco_fast.models.encoders import NARROW, Encoder, architectures

Shapes = dict[str, tuple[int, ...]]

_NARROW_STEM = (24, 3, 5, 5)
_COUNTER = "num_batches_tracked"  # files older than the counter lack it, and nothing here depends on it


@dataclass(frozen=True, eq=False)
class Found:
    """An encoder among a file's tensors.

    Attributes:
        arch, stem: as `Encoder` takes them.
        backbone: its backbone's tensors, by the names of `Encoder.backbone`; counters of batches may be missing.
        rest: the other tensors under the same prefix, without it: a head or a classifier.
    """

    arch: str
    stem: str
    backbone: dict[str, Tensor]
    rest: dict[str, Tensor]


def prefixes(tensors: Mapping[str, Tensor]) -> list[str]:
    """What stands before the names of each residual network among the tensors: before its stem, which reads images.

    The narrow network's names are any `Sequential`'s: it is looked for where there is no other, by all of its shapes.
    """
    found = [
        name.removesuffix("conv1.weight")
        for name, tensor in tensors.items()
        if name.endswith("conv1.weight") and tensor.ndim == 4 and tensor.shape[1] == 3
    ]
    stems = [name for name, tensor in tensors.items() if f".{name}".endswith(".0.weight")]
    narrow = [name.removesuffix("0.weight") for name in stems if tuple(tensors[name].shape) == _NARROW_STEM]
    return found or [prefix for prefix in narrow if not _wrong(NARROW, "imagenet", _shapes(_inside(tensors, prefix)))]


def recognise(tensors: Mapping[str, Tensor], prefix: str) -> Found:
    """The encoder whose tensors have this prefix, as torchvision or the narrow network's `Sequential` names them.

    Raises:
        UserError: they are not those of a residual network, by name or shape.
    """
    inside = _inside(tensors, prefix)
    shapes = _shapes(inside)
    best: tuple[int, str, list[str]] = (len(shapes) + 10**6, "", [])
    for (arch, stem), expected in _backbones().items():
        wrong = _wrong(arch, stem, shapes)
        if not wrong:
            backbone = {name: inside[name] for name in expected if name in inside}
            return Found(arch, stem, backbone, {name: inside[name] for name in inside if name not in expected})
        if len(wrong) < best[0] and arch != NARROW:
            best = len(wrong), arch, wrong
    count, arch, wrong = best
    raise UserError(
        f"its weights are those of no encoder known here: the nearest, {arch}, differs in {count} tensors, "
        f"{wrong[0]} among them; known are torchvision's {', '.join(architectures()[1:])}"
    )


def _inside(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _shapes(tensors: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(value.shape) for name, value in tensors.items()}


def _wrong(arch: str, stem: str, shapes: Shapes) -> list[str]:
    """What a network's backbone lacks among these, has in another shape, or would have if it were a deeper one."""
    expected = _backbones()[arch, stem]
    wrong = [name for name, shape in expected.items() if shapes.get(name) != shape]
    # A shallower network's names are among a deeper one's.
    blocks = tuple("0123456789") if arch == NARROW else "layer"
    wrong += [name for name in shapes if name.startswith(blocks) and name not in expected]
    return [name for name in wrong if not name.endswith(_COUNTER)]


@functools.cache
def _backbones() -> dict[tuple[str, str], Shapes]:
    """Names and shapes of the backbone of each network, by (arch, stem)."""
    found = {}
    with torch.device("meta"):
        for arch in architectures():
            for stem in ("imagenet", "cifar"):
                if (arch, stem) != (NARROW, "cifar"):
                    found[arch, stem] = _shapes(Encoder(arch, stem=stem, dim=None).backbone.state_dict())
    return found
