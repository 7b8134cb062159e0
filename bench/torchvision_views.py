"""The recipes as their own users write them, with torchvision on PIL images: what the pipeline is compared with."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from PIL import Image, ImageFilter
from torch import nn
from torchvision import transforms
from torchvision.transforms import functional as F

from synco_fast.data.recipes import Recipe
from synco_fast.data.views import ViewParameters


def torchvision_recipe(recipe: Recipe, size: int) -> transforms.Compose:
    """A recipe as MoCo's users write it in torchvision: a random, normalised view of a PIL image."""
    jitter = transforms.ColorJitter(recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue)
    colour: list[Any] = [transforms.RandomApply([jitter], recipe.jitter_probability)]
    colour.insert(0 if recipe.grey_first else 1, transforms.RandomGrayscale(recipe.grey_probability))
    if recipe.blur_probability:
        colour.append(transforms.RandomApply([PillowBlur(recipe.blur_sigma)], recipe.blur_probability))
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, recipe.crop_scale, recipe.crop_ratio),
            *colour,
            transforms.RandomHorizontalFlip(recipe.flip_probability),
            transforms.ToTensor(),
            transforms.Normalize(recipe.mean, recipe.std, inplace=True),
        ]
    )


class PillowBlur(nn.Module):
    """Gaussian blur by Pillow with a random sigma; torchvision's own blur is another."""

    def __init__(self, sigma: tuple[float, float]) -> None:
        super().__init__()
        self.sigma = sigma

    def forward(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(float(torch.empty(()).uniform_(*self.sigma))))


def torchvision_view(
    image: Image.Image, parameters: ViewParameters, row: int, recipe: Recipe, size: int, *, rows_first: bool = False
) -> Image.Image:
    """One view as the recipes' own code makes it: torchvision and Pillow, with given parameters.

    Args:
        image: RGB.
        parameters, row: of the view.
        recipe: says when grey comes.
        size: height and width of the view, pixels.
        rows_first: resize along rows, then along columns, which Pillow 13 and later do in the cheaper order.
    """
    (top, left), (height, width) = parameters.start[row].tolist(), parameters.shape[row].tolist()
    image = F.crop(image, top, left, height, width)
    if rows_first:
        image = image.resize((size, height), Image.Resampling.BILINEAR)
    image = F.resize(image, [size, size], F.InterpolationMode.BILINEAR)
    for step in _colour_steps(parameters, row, recipe):
        image = step(image)
    if parameters.blur_sigma[row] > 0:
        image = image.filter(ImageFilter.GaussianBlur(parameters.blur_sigma[row].item()))
    return F.hflip(image) if parameters.flip[row] else image


def _colour_steps(parameters: ViewParameters, row: int, recipe: Recipe) -> list[Callable[[Image.Image], Image.Image]]:
    factors = [getattr(parameters, name)[row].item() for name in ("brightness", "contrast", "saturation", "hue")]
    adjust = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    order = parameters.jitter_order[row].tolist() if parameters.jittered[row] else []
    names = ("brightness_factor", "contrast_factor", "saturation_factor", "hue_factor")
    steps: list[Callable[[Image.Image], Image.Image]] = [
        partial(adjust[i], **{names[i]: factors[i]}) for i in order if i >= 0
    ]
    if parameters.grey[row]:
        steps.insert(0 if recipe.grey_first else len(steps), partial(F.to_grayscale, num_output_channels=3))
    return steps
