"""A picture of what the augmentation does: originals beside their two views."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from synco_fast.data.index import Index
from synco_fast.data.loader import EvalLoader, TrainLoader
from synco_fast.data.order import batch_samples
from synco_fast.data.recipes import IMAGENET_MEAN, IMAGENET_STD, Recipe
from synco_fast.errors import UserError

_GAP = 4


def save_grid(
    index: Index, path: Path, *, n: int, image_size: int, recipe: Recipe, seed: int, threads: int = 2
) -> None:
    """Write a PNG with a row per image: the centre crop, then both views, on a white ground.

    Args:
        index: the images; the first n of epoch 0 are shown, or all if there are fewer.
        path: the PNG to write.
        n: number of rows.
        image_size: height and width of each picture, pixels.
        recipe: the augmentation.
        seed: as in training, so that the views are those of the first batch of n.
        threads: CPU threads.

    Raises:
        UserError: an image cannot be read, or the PNG cannot be written.
    """
    cpu = torch.device("cpu")
    n = min(n, len(index))
    shown = index.take(batch_samples(len(index), n, seed, epoch=0, step=0).tolist())
    originals = EvalLoader(
        shown,
        batch_size=n,
        image_size=image_size,
        resize=image_size,
        dtype=torch.float32,
        device=cpu,
        threads=threads,
        prefetch=1,
    )
    [(centre_crops, _)] = originals
    loader = TrainLoader(
        index,
        batch_size=n,
        image_size=image_size,
        recipe=recipe,
        seed=seed,
        device=cpu,
        threads=threads,
        prefetch=1,
    )
    try:
        views = next(loader).views
    finally:
        loader.close()
    columns = [_pixels(centre_crops, IMAGENET_MEAN, IMAGENET_STD)]
    columns += [_pixels(view, recipe.mean, recipe.std) for view in views]
    try:
        Image.fromarray(_tile(torch.stack(columns, dim=1)).numpy()).save(path, format="PNG")
    except OSError as error:
        raise UserError(f"the grid {path} cannot be written: {error.strerror}") from error


def _pixels(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Normalised (B, 3, H, W) back to uint8 (B, H, W, 3)."""
    images = images.permute(0, 2, 3, 1) * torch.tensor(std) + torch.tensor(mean)
    return (255 * images).round().clamp(0, 255).byte()


def _tile(pictures: Tensor) -> Tensor:
    """(rows, columns, H, W, 3) uint8 to one (height, width, 3) picture with white gaps."""
    rows, columns, height, width, _ = pictures.shape
    canvas = pictures.new_full((rows * (height + _GAP) + _GAP, columns * (width + _GAP) + _GAP, 3), 255)
    for row in range(rows):
        for column in range(columns):
            top, left = _GAP + row * (height + _GAP), _GAP + column * (width + _GAP)
            canvas[top : top + height, left : left + width] = pictures[row, column]
    return canvas
