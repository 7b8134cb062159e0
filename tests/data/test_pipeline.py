"""The DALI pipelines against torchvision and Pillow, bit for bit, on JPEG files."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as F

from bench.torchvision_views import torchvision_view
from synco_fast.data import operator
from synco_fast.data.index import Index, scan
from synco_fast.data.loader import EvalLoader
from synco_fast.data.numbers import view_numbers
from synco_fast.data.operator import Augmentation, dali
from synco_fast.data.pipeline import train_pipeline
from synco_fast.data.reader import read_image
from synco_fast.data.recipes import IMAGENET_MEAN, IMAGENET_STD, RECIPES, Recipe
from synco_fast.data.views import ViewParameters, view_parameters
from synco_fast.errors import UserError

SIZE = 57
CPU = torch.device("cpu")
V2 = RECIPES["moco_v2"]

both = pytest.mark.parametrize("augmentation", ["compiled", "plain"])


@pytest.fixture(scope="module")
def index(photographs: list[Path]) -> Index:
    return scan(photographs[0].parent)


def drawn(index: Index, recipe: Recipe, view: int = 0) -> ViewParameters:
    sizes = torch.tensor([Image.open(index.path(i)).size[::-1] for i in range(len(index))])
    return view_parameters(sizes, recipe, seed=1, epoch=2, positions=torch.arange(len(index)), view=view)


def views(
    index: Index, parameters: list[ViewParameters], recipe: Recipe, augmentation: Augmentation, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Both views as the pipeline gives them, (B, SIZE, SIZE, 3)."""
    encoded = [read_image(index.sample(i))[0] for i in range(len(index))]
    batches = iter([[encoded, *(view_numbers(view, recipe, SIZE).numpy() for view in parameters)]])
    pipeline = train_pipeline(
        lambda: next(batches),
        recipe=recipe,
        views=len(parameters),
        batch_size=len(index),
        image_size=SIZE,
        dtype=dtype,
        augmentation=augmentation,
        device=CPU,
        threads=2,
        prefetch=1,
    )
    return [torch.from_numpy(np.array(output.as_tensor())) for output in pipeline.run()]


def expected(index: Index, parameters: ViewParameters, recipe: Recipe) -> torch.Tensor:
    """The same from torchvision: uint8, before it is normalised."""
    images = [Image.open(index.path(i)).convert("RGB") for i in range(len(index))]
    made = [torchvision_view(image, parameters, i, recipe, SIZE, rows_first=True) for i, image in enumerate(images)]
    return torch.from_numpy(np.stack(made))


def normalised(pixels: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """In float64, so that its only rounding is the last."""
    mean, std = (torch.tensor(x, dtype=torch.float64) for x in (recipe.mean, recipe.std))
    return (pixels.double() / 255 - mean) / std


@both
@pytest.mark.parametrize("name", RECIPES)
def test_views_are_torchvisions(index: Index, name: str, augmentation: Augmentation) -> None:
    recipe = RECIPES[name]
    parameters = [drawn(index, recipe, view) for view in (0, 1)]
    for ours, view in zip(views(index, parameters, recipe, augmentation, torch.float32), parameters, strict=True):
        assert torch.equal(ours, normalised(expected(index, view, recipe), recipe).float())
    assert not torch.equal(*(expected(index, view, recipe) for view in parameters))


@both
def test_half_precision_is_rounded_once(index: Index, augmentation: Augmentation) -> None:
    parameters = drawn(index, V2)
    ours, _ = views(index, [parameters] * 2, V2, augmentation, torch.float16)
    assert torch.equal(ours, normalised(expected(index, parameters, V2), V2).float().half())


def test_a_view_changes_no_other(index: Index) -> None:
    """One row is blurred: the others keep their bits."""
    parameters = dataclasses.replace(drawn(index, V2), blur_sigma=torch.zeros(len(index)))
    sigma = torch.zeros(len(index))
    sigma[2] = 1.5
    blurred = dataclasses.replace(parameters, blur_sigma=sigma)
    plain, mixed = views(index, [parameters, blurred], V2, "compiled", torch.float32)
    assert [torch.equal(a, b) for a, b in zip(plain, mixed, strict=True)] == [i != 2 for i in range(len(index))]


@both
def test_evaluation_is_torchvisions_centre_crop(index: Index, augmentation: Augmentation) -> None:
    loader = EvalLoader(
        index,
        batch_size=4,
        image_size=SIZE,
        resize=64,
        dtype=torch.float32,
        augmentation=augmentation,
        device=CPU,
        threads=2,
        prefetch=1,
    )
    images = torch.cat([images for images, _ in loader]).permute(0, 2, 3, 1)
    for i, ours in enumerate(images):
        image = Image.open(index.path(i)).convert("RGB")
        height, width = (64 * side // min(image.size) for side in image.size[::-1])
        rows_first = image.resize((width, image.height), Image.Resampling.BILINEAR)
        cropped = F.center_crop(F.resize(rows_first, [height, width]), [SIZE, SIZE])
        mean, std = (torch.tensor(x, dtype=torch.float64) for x in (IMAGENET_MEAN, IMAGENET_STD))
        assert torch.equal(ours, ((torch.from_numpy(np.array(cropped)).double() / 255 - mean) / std).float())


@pytest.mark.parametrize("name", ["bee/001.jpg", "bee/002.jpg", "cat/002.jpg"])
def test_grey_cmyk_and_exif_rotated_files(jpeg_root: Path, name: str) -> None:
    index = scan(jpeg_root)
    one = index.take([index.files.index(name)])
    parameters = drawn(one, V2)
    ours, _ = views(one, [parameters] * 2, V2, "compiled", torch.float32)
    assert torch.equal(ours, normalised(expected(one, parameters, V2), V2).float())


def test_missing_dali_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(UserError, match=r"install the cuda12 or the cuda13 extra.*pip install -e \.\[cuda12\]"):
        dali()
    operator._load.cache_clear()
    with pytest.raises(UserError, match="install the cuda12 or the cuda13 extra"):
        operator.resolve("auto", CPU)
