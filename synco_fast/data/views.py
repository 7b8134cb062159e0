"""Random parameters of a view, as a pure function of (seed; epoch, position, view).

The draws do not depend on the batch size, on the rank or on what was drawn before, so any batch of any epoch
can be made alone, on any number of ranks.
"""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from synco_fast.data.order import VIEW_STREAM, data_key
from synco_fast.data.recipes import Recipe
from synco_fast.ops.philox import integers, philox, uniform

_CROP_ATTEMPTS = 10
_FACTORS_BLOCK, _SWITCHES_BLOCK, _BLUR_BLOCK = range(_CROP_ATTEMPTS, _CROP_ATTEMPTS + 3)
_PERMUTATIONS = torch.tensor(list(itertools.permutations(range(4))))


@dataclass(frozen=True, eq=False)
class ViewParameters:
    """Parameters of one view of B samples.

    Attributes:
        start: (B, 2) int64, crop's top and left, pixels of the decoded image.
        shape: (B, 2) int64, crop's height and width, pixels.
        jittered: (B,) bool, the four colour jitters apply.
        brightness, contrast, saturation: (B,) float32 factors, 1 = unchanged.
        hue: (B,) float32 shift in turns of the colour circle.
        jitter_order: (B, 4) int64, the order to apply 0 brightness, 1 contrast, 2 saturation, 3 hue; -1: none.
        grey: (B,) bool, lose all colour.
        blur_sigma: (B,) float32, pixels of the output, 0 = no blur.
        flip: (B,) bool, left-right.
    """

    start: Tensor
    shape: Tensor
    jittered: Tensor
    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    hue: Tensor
    jitter_order: Tensor
    grey: Tensor
    blur_sigma: Tensor
    flip: Tensor


def view_parameters(
    sizes: Tensor, recipe: Recipe, seed: int, epoch: int, positions: Tensor, view: int
) -> ViewParameters:
    """Draw one view's parameters.

    Args:
        sizes: (B, 2) int64, height and width of each decoded image.
        recipe: the distributions.
        seed, epoch: of the run.
        positions: (B,) int64, places in the epoch's global order.
        view: 0 or 1.
    """
    blocks = torch.arange(_BLUR_BLOCK + 1)[:, None]
    words = philox(data_key(seed), positions, view, VIEW_STREAM | blocks << 8, epoch)
    start, shape = _crop(sizes, recipe, [word[:_CROP_ATTEMPTS] for word in words])

    strengths = (recipe.brightness, recipe.contrast, recipe.saturation)
    factors = [_between(words[i][_FACTORS_BLOCK], max(0.0, 1 - x), 1 + x).float() for i, x in enumerate(strengths)]
    blurred = uniform(words[0][_BLUR_BLOCK]) < recipe.blur_probability
    sigma = _between(words[1][_BLUR_BLOCK], *recipe.blur_sigma).float()
    return ViewParameters(
        start=start,
        shape=shape,
        jittered=uniform(words[0][_SWITCHES_BLOCK]) < recipe.jitter_probability,
        brightness=factors[0],
        contrast=factors[1],
        saturation=factors[2],
        hue=_between(words[3][_FACTORS_BLOCK], -recipe.hue, recipe.hue).float(),
        jitter_order=_PERMUTATIONS[integers(words[1][_SWITCHES_BLOCK], len(_PERMUTATIONS))],
        grey=uniform(words[2][_SWITCHES_BLOCK]) < recipe.grey_probability,
        blur_sigma=torch.where(blurred, sigma, 0.0),
        flip=uniform(words[3][_SWITCHES_BLOCK]) < recipe.flip_probability,
    )


def _between(words: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * uniform(words, torch.float64)


def _crop(sizes: Tensor, recipe: Recipe, words: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Start and shape, each (B, 2), distributed as torchvision's RandomResizedCrop; words are (attempts, B).

    An attempt whose rectangle does not fit is dropped; the first that fits is used, else a centre crop with
    the ratio brought into range.
    """
    height, width = sizes.unbind(-1)
    area = (height * width).double() * _between(words[0], *recipe.crop_scale)
    low, high = recipe.crop_ratio
    ratio = torch.exp(_between(words[1], math.log(low), math.log(high)))
    crop_width = torch.round(torch.sqrt(area * ratio)).long()
    crop_height = torch.round(torch.sqrt(area / ratio)).long()
    fits = (crop_width > 0) & (crop_width <= width) & (crop_height > 0) & (crop_height <= height)
    # Which of equal values argmax picks is unspecified; counting attempts down makes the first the largest.
    countdown = torch.arange(_CROP_ATTEMPTS, 0, -1)[:, None]
    first = torch.argmax(fits * countdown, dim=0, keepdim=True)

    shape = torch.stack([crop_height.gather(0, first)[0], crop_width.gather(0, first)[0]], dim=-1)
    offsets = [word.gather(0, first)[0] for word in words[2:]]
    fallback = torch.stack(
        [
            torch.where(width < low * height, torch.round(width.double() / low).long(), height),
            torch.where(width > high * height, torch.round(height.double() * high).long(), width),
        ],
        dim=-1,
    )
    found = fits.any(dim=0)[:, None]
    shape = torch.where(found, shape, fallback)
    room = sizes - shape
    start = torch.stack([integers(offset, room[:, i] + 1) for i, offset in enumerate(offsets)], dim=-1)
    return torch.where(found, start, room // 2), shape
