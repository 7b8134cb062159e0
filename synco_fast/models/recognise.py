"""Which encoder a file's tensors belong to: from their names and shapes, whatever stands before the names."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from synco_fast.errors import UserError
from synco_fast.models.encoders import NARROW, Encoder, architectures

Shapes = dict[str, tuple[int, ...]]

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
    """What stands before the names of each residual network among the tensors: before its stem, which reads images."""
    return [
        name.removesuffix("conv1.weight")
        for name, tensor in tensors.items()
        if name.endswith("conv1.weight") and tensor.ndim == 4 and tensor.shape[1] == 3
    ]


def recognise(tensors: Mapping[str, Tensor], prefix: str) -> Found:
    """The encoder whose tensors have this prefix, as torchvision names them.

    Raises:
        UserError: they are not those of a residual network, by name or shape.
    """
    inside = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    shapes = {name: tuple(value.shape) for name, value in inside.items()}
    best: tuple[int, str, list[str]] = (len(shapes) + 10**6, "", [])
    for (arch, stem), expected in _backbones().items():
        wrong = [name for name, shape in expected.items() if shapes.get(name) != shape]
        # A shallower network's names are among a deeper one's.
        wrong += [name for name in shapes if name.startswith("layer") and name not in expected]
        wrong = [name for name in wrong if not name.endswith(_COUNTER)]
        if not wrong:
            backbone = {name: inside[name] for name in expected if name in inside}
            return Found(arch, stem, backbone, {name: inside[name] for name in inside if name not in expected})
        if len(wrong) < best[0]:
            best = len(wrong), arch, wrong
    count, arch, wrong = best
    raise UserError(
        f"its weights are those of no encoder known here: the nearest, {arch}, differs in {count} tensors, "
        f"{wrong[0]} among them; known are torchvision's {', '.join(architectures()[1:])}"
    )


@functools.cache
def _backbones() -> dict[tuple[str, str], Shapes]:
    """Names and shapes of the backbone of each torchvision network, by (arch, stem)."""
    found = {}
    with torch.device("meta"):
        for arch in architectures():
            for stem in ("imagenet", "cifar"):
                if arch != NARROW:
                    state = Encoder(arch, stem=stem, dim=None).backbone.state_dict()
                    found[arch, stem] = {name: tuple(value.shape) for name, value in state.items()}
    return found
