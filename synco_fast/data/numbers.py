"""A view as the numbers that the augmentation operator takes: the `View` of kernels/include/synco/view.h.

What torchvision and Pillow derive from a parameter before they touch a pixel is derived here, once for every
implementation of the operator.
"""

import torch
from torch import Tensor

from synco_fast.data.recipes import Recipe
from synco_fast.data.views import ViewParameters

HUE, GREY, NOTHING = 3, 4, -1
"""Colour operations are numbered as in `ViewParameters.jitter_order`, and grey after them."""
COLOUR_STEPS = 5
VIEW_NUMBERS = 12 + 2 * COLOUR_STEPS
BLUR_PASSES = 3


def view_numbers(parameters: ViewParameters, recipe: Recipe, size: int) -> Tensor:
    """A training view's numbers, (B, VIEW_NUMBERS) float32.

    Crop's top, left, height and width; height and width it is resized to; top and left of the view in that; flip;
    blur's radius and two weights; colour steps.
    """
    whole = torch.tensor([size, size, 0, 0]).expand(len(parameters.flip), 4)
    parts = [parameters.start, parameters.shape, whole, parameters.flip[:, None], _box_blur(parameters.blur_sigma)]
    return torch.cat([*(part.float() for part in parts), _colour_steps(parameters, recipe)], dim=1)


def evaluation_numbers(sizes: Tensor, resize: int, size: int) -> Tensor:
    """Numbers of the centre crops of whole, resized images, as torchvision's Resize and CenterCrop choose them.

    Args:
        sizes: (B, 2) int64, height and width of each decoded image.
        resize: length of the shorter side after resizing, at least size.
        size: height and width of the crop.
    """
    n = len(sizes)
    resized = resize * sizes // sizes.amin(dim=1, keepdim=True)
    window = torch.round((resized - size) / 2)
    plain = [torch.tensor(numbers).expand(n, -1) for numbers in ([0, -1, 0, 0], [NOTHING, 0] * COLOUR_STEPS)]
    return torch.cat([part.float() for part in (torch.zeros(n, 2), sizes, resized, window, *plain)], dim=1)


def value_table(mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """What each 8-bit value of each channel becomes: (3, 256) float32, (value / 255 - mean) / std."""
    means, stds = (torch.tensor(x, dtype=torch.float64)[:, None] for x in (mean, std))
    return ((torch.arange(256, dtype=torch.float64) / 255 - means) / stds).float()


def _colour_steps(parameters: ViewParameters, recipe: Recipe) -> Tensor:
    """(B, 2 * COLOUR_STEPS): operation and factor, in the order of application, NOTHING where one is left out."""
    jittered, order = parameters.jittered[:, None], parameters.jitter_order
    # torchvision cuts the shift to whole 1/256 of the circle, of what it takes for 1/255.
    hue = (parameters.hue.double() * 255).trunc().long() & 255
    factors = torch.stack([parameters.brightness, parameters.contrast, parameters.saturation, hue.float()], dim=1)
    grey = torch.where(parameters.grey, GREY, NOTHING)[:, None]
    kinds = [torch.where(jittered, order, NOTHING), grey]
    ordered = [factors.gather(1, order.clamp(min=0)), torch.zeros_like(grey)]
    if recipe.grey_first:
        kinds, ordered = kinds[::-1], ordered[::-1]
    return torch.stack([torch.cat(kinds, dim=1).float(), torch.cat(ordered, dim=1).float()], dim=2).flatten(1)


def _box_blur(sigma: Tensor) -> Tensor:
    """(B, 3) int64: radius, weight and edge weight of the box whose three passes make Pillow's Gaussian blur.

    From (B,) float32 standard deviations, 0 = no blur and radius -1. Weights are in 2^-24. The box's length follows
    Gwosdek et al., "Theoretical foundations of Gaussian convolution by extended box filtering" (2011), equations 7, 11
    and 14; what is rounded to float32 is what Pillow rounds.
    """
    variance = sigma * sigma / BLUR_PASSES
    length = (12.0 * variance.double() + 1.0).sqrt().float()
    whole = ((length.double() - 1.0) / 2.0).floor().float()
    rest = ((2 * whole + 1).double() * ((whole * (whole + 1)).double() - 3.0 * variance.double())).float()
    rest = (rest.double() / (6.0 * (variance - (whole + 1) * (whole + 1)).double())).float()
    radius = whole + rest
    inside = radius.long()
    weight = (2.0**24 / (radius * 2 + 1)).long()
    edge_weight = (2**24 - (2 * inside + 1) * weight) // 2
    blurred = sigma > 0
    return torch.stack([torch.where(blurred, inside, -1), weight, edge_weight], dim=1)
