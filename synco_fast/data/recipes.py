"""Augmentation recipes: what is drawn for every view, and how likely."""

from dataclasses import dataclass

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Recipe:
    """Distribution of a view's parameters.

    Attributes:
        crop_scale: range of the crop's share of the image area.
        crop_ratio: range of the crop's width / height, uniform in the logarithm.
        jitter_probability: chance that the four colour jitters apply.
        brightness, contrast, saturation: factors are uniform in [max(0, 1 - x), 1 + x].
        hue: shifts are uniform in [-x, x] turns of the colour circle.
        grey_probability: chance of losing all colour.
        grey_first: colour is lost before the jitter, not after it.
        blur_probability: chance of a Gaussian blur.
        blur_sigma: range of its standard deviation, pixels of the output.
        flip_probability: chance of a left-right flip.
        mean, std: per-channel normalisation, RGB in [0, 1].
    """

    crop_scale: tuple[float, float] = (0.2, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    jitter_probability: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    grey_probability: float = 0.2
    grey_first: bool = False
    blur_probability: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    flip_probability: float = 0.5
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


RECIPES = {
    "moco_v2": Recipe(),  # arXiv 2003.04297, section 3
    "moco_v1": Recipe(
        jitter_probability=1.0, hue=0.4, grey_first=True, blur_probability=0.0
    ),  # arXiv 1911.05722, section 3.2
}

SUPERVISED = Recipe(crop_scale=(0.08, 1.0), jitter_probability=0.0, grey_probability=0.0, blur_probability=0.0)
"""Random resized crop and flip: what a classifier is trained with (torchvision's reference; MoCo's linear probe)."""
