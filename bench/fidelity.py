"""The pipeline's views against torchvision's on PIL images: python -m bench.fidelity --data DIR.

Each row is one operation on the same photographs with the same parameters, through the whole pipeline (encoded file in,
view out). Differences are in units of 0..255.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bench.about import about_run, default_output
from bench.rows import append
from bench.torchvision_views import torchvision_recipe, torchvision_view
from synco_fast.data.index import Index, scan
from synco_fast.data.loader import TrainLoader
from synco_fast.data.numbers import view_numbers
from synco_fast.data.operator import Augmentation, resolve
from synco_fast.data.pipeline import train_pipeline
from synco_fast.data.reader import read_image
from synco_fast.data.recipes import IMAGENET_MEAN, IMAGENET_STD, RECIPES, Recipe
from synco_fast.data.views import ViewParameters, view_parameters
from synco_fast.errors import UserError

Row = dict[str, Any]
CPU = torch.device("cpu")
JITTERS = ("brightness", "contrast", "saturation", "hue")
OPERATIONS = ("resize", *JITTERS, "grey", "blur", "flip")
_SATURATED = 64  # of 255, in saturation and value: below, 8 bits do not hold a hue to a degree


def pipeline_views(
    index: Index, parameters: ViewParameters, recipe: Recipe, size: int, *, augmentation: Augmentation = "auto"
) -> np.ndarray:
    """All images' views from the DALI pipeline: (n, size, size, 3) uint8."""
    encoded = [read_image(index.sample(i))[0] for i in range(len(index))]
    numbers = view_numbers(parameters, recipe, size).numpy()
    batches = iter([[encoded, numbers]])
    pipeline = train_pipeline(
        lambda: next(batches),
        recipe=recipe,
        views=1,
        batch_size=len(index),
        image_size=size,
        dtype=torch.float32,
        augmentation=augmentation,
        device=CPU,
        threads=2,
        prefetch=1,
    )
    view = torch.from_numpy(np.array(pipeline.run()[0].as_tensor()))
    return to_pixels(view, recipe.mean, recipe.std).numpy()


def to_pixels(view: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalised (..., 3) back to the uint8 values it was made of."""
    return (255 * (view * torch.tensor(std) + torch.tensor(mean))).round().byte()


def neutral(parameters: ViewParameters) -> ViewParameters:
    """The same crops, and nothing else done to them."""
    off = torch.zeros_like(parameters.flip)
    return replace(parameters, jittered=off, grey=off, flip=off, blur_sigma=torch.zeros_like(parameters.blur_sigma))


def alone(parameters: ViewParameters, operation: str) -> ViewParameters:
    """The same crops and factors, with one operation of OPERATIONS applied to all of them."""
    base, on = neutral(parameters), torch.ones_like(parameters.flip)
    if operation == "resize":
        return base
    if operation in ("grey", "flip"):
        return replace(base, **{operation: on})
    if operation == "blur":
        return replace(base, blur_sigma=torch.linspace(0.1, 2, len(on)))
    order = torch.tensor([JITTERS.index(operation), -1, -1, -1])
    return replace(base, jittered=on, jitter_order=order.expand_as(parameters.jitter_order))


def compare(index: Index, size: int, augmentation: Augmentation) -> list[Row]:
    """A row for each operation on its own, and for each recipe as a whole.

    torchvision resizes along rows first, as we do and as Pillow does up to 12, unless `pillow_order` is true: Pillow 13
    begins with columns where that is cheaper.
    """
    images = [Image.open(index.path(i)).convert("RGB") for i in range(len(index))]
    sizes = torch.tensor([(image.height, image.width) for image in images])
    rows = []
    for name in (*OPERATIONS, *RECIPES):
        recipe = RECIPES.get(name, RECIPES["moco_v2"])
        drawn = view_parameters(sizes, recipe, seed=0, epoch=0, positions=torch.arange(len(index)), view=0)
        parameters = drawn if name in RECIPES else alone(drawn, name)
        ours = pipeline_views(index, parameters, recipe, size, augmentation=augmentation)
        for pillow_order in (False, True) if name in ("resize", *RECIPES) else (False,):
            theirs = [
                np.asarray(torchvision_view(image, parameters, i, recipe, size, rows_first=not pillow_order))
                for i, image in enumerate(images)
            ]
            rows.append({"operation": name, "pillow_order": pillow_order, **differences(ours, np.stack(theirs))})
    return rows


def differences(ours: np.ndarray, theirs: np.ndarray) -> Row:
    """Of two (n, size, size, 3) uint8 batches: mean and max in 0..255, share of values that differ, hue in degrees."""
    difference = np.abs(ours.astype(int) - theirs)
    return {
        "mean": float(difference.mean()),
        "max": int(difference.max()),
        "differing": float((difference > 0).mean()),
        "hue_degrees": hue_error(ours, theirs),
    }


def hue_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest difference of hue over the pixels that are saturated in both, degrees; NaN if there are none."""
    (hue, saturated), (other, other_saturated) = hue_of(ours), hue_of(theirs)
    apart = np.abs(hue - other)[saturated & other_saturated]
    return float(np.minimum(apart, 360 - apart).max()) if len(apart) else float("nan")


def hue_of(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hue in degrees and whether it means something, from (..., 3) uint8."""
    colours = pixels.astype(float)
    value, spread = colours.max(axis=-1), np.ptp(colours, axis=-1)
    leading, divisor = colours.argmax(axis=-1), np.maximum(spread, 1)
    after = np.take_along_axis(colours, (leading[..., None] + 1) % 3, axis=-1)[..., 0]
    before = np.take_along_axis(colours, (leading[..., None] + 2) % 3, axis=-1)[..., 0]
    saturated = (value >= _SATURATED) & (255 * spread >= _SATURATED * value)
    return 60 * (2 * leading + (after - before) / divisor) % 360, saturated


def channel_statistics(index: Index, size: int, views: int) -> list[Row]:
    """Mean and variance of each channel, normalised views of moco_v2, from each side's own random draws."""
    per_image = views // len(index)
    recipe = RECIPES["moco_v2"]
    loader = TrainLoader(
        index, batch_size=len(index), image_size=size, recipe=recipe, seed=0, device=CPU, threads=2, prefetch=1
    )
    ours, theirs = Moments(), Moments()
    for _ in range(-(-per_image // 2)):
        for view in next(loader).views:
            ours.add(view.permute(0, 2, 3, 1))
    loader.close()
    torch.manual_seed(0)
    augment = torchvision_recipe(recipe, size)
    for i in range(len(index)):
        image = Image.open(index.path(i)).convert("RGB")
        for _ in range(per_image):
            theirs.add(augment(image).permute(1, 2, 0))
    return [
        {"channel": name, "ours": a, "torchvision": b, "relative": abs(a - b) / abs(b)}
        for name, a, b in zip(Moments.names, ours.values(), theirs.values(), strict=True)
    ]


class Moments:
    """Channel means and variances, in units of 0..255, of views that are added one by one."""

    names = tuple(f"{what} of {channel}" for what in ("mean", "variance") for channel in ("red", "green", "blue"))

    def __init__(self) -> None:
        self._counts = torch.zeros(3, 256, dtype=torch.float64)

    def add(self, view: Tensor) -> None:
        channels = to_pixels(view, IMAGENET_MEAN, IMAGENET_STD).reshape(-1, 3).unbind(dim=1)
        self._counts += torch.stack([torch.bincount(channel, minlength=256) for channel in channels])

    def values(self) -> list[float]:
        shares, levels = self._counts / self._counts.sum(dim=1, keepdim=True), torch.arange(256.0).double()
        mean = shares @ levels
        return [*mean.tolist(), *(shares @ levels.square() - mean.square()).tolist()]


def table(rows: Sequence[Row]) -> str:
    """The rows of one run as text."""
    lines = [f"{'operation':<26} {'mean':>8} {'max':>5} {'differing':>10} {'hue, degrees':>13}"]
    for row in rows:
        if "operation" in row:
            hue, share = row["hue_degrees"], row["differing"]
            name = row["operation"] + (" (order of Pillow)" if row["pillow_order"] else "")
            lines.append(f"{name:<26} {row['mean']:>8.4f} {row['max']:>5} {share:>10.4%} {hue:>13.2f}")
    lines += ["", f"{'channel':<26} {'ours':>8} {'torchvision':>12} {'apart':>7}"]
    for row in rows:
        if "channel" in row:
            lines.append(
                f"{row['channel']:<26} {row['ours']:>8.2f} {row['torchvision']:>12.2f} {row['relative']:>7.2%}"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the pipeline's views with torchvision's.")
    parser.add_argument("--data", type=Path, required=True, help="folder of images or file list, as data.root")
    parser.add_argument("--images", type=int, default=100, help="how many of them")
    parser.add_argument("--size", type=int, default=224, help="side of a view in pixels")
    parser.add_argument("--views", type=int, default=20000, help="views of each side for the channel statistics")
    parser.add_argument("--augmentation", choices=("auto", "compiled", "plain"), default="auto")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: by device and date in bench/results")
    options = parser.parse_args()
    try:
        index = scan(options.data)
        if index.shards:
            raise UserError(f"{options.data} holds shards; expected images in files of their own")
        index = index.take(range(min(options.images, len(index))))
        about = about_run("cpu", ["torchvision", "pillow", "nvidia-dali-cuda120", "nvidia-dali-cuda130"])
        rows = compare(index, options.size, options.augmentation)
        rows += channel_statistics(index, options.size, options.views)
    except UserError as error:
        sys.exit(f"error: {error}")
    common = {
        "images": len(index),
        "size": options.size,
        "views": options.views,
        "augmentation": resolve(options.augmentation, CPU),
    }
    append(options.output or default_output("fidelity", about), [{**row, **common, **about} for row in rows])
    print(table(rows))


if __name__ == "__main__":
    main()
