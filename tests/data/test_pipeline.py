"""The DALI pipelines, step by step, against PIL, torchvision and SciPy."""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from torchvision.transforms import functional as F

from synco_fast.data.pipeline import colour_matrices, dali, train_pipeline, view_inputs
from synco_fast.data.reader import read_image
from synco_fast.data.recipes import RECIPES
from synco_fast.data.samples import Sample
from synco_fast.data.views import ViewParameters
from synco_fast.errors import UserError

SIZE = 96
V2 = RECIPES["moco_v2"]
MEAN, STD = torch.tensor(V2.mean), torch.tensor(V2.std)


def neutral(paths: list[Path]) -> ViewParameters:
    """Parameters that only crop: the middle 3/4 of each image, to its left."""
    n = len(paths)
    sizes = torch.tensor([Image.open(path).size[::-1] for path in paths])
    shape = sizes * 3 // 4
    start = torch.stack([(sizes - shape)[:, 0] // 2, torch.zeros(n, dtype=torch.int64)], dim=1)
    ones = torch.ones(n)
    return ViewParameters(
        start=start,
        shape=shape,
        brightness=ones,
        contrast=ones,
        saturation=ones,
        hue=0 * ones,
        jitter_order=torch.arange(4).expand(n, 4),
        grey=ones < 0,
        blur_sigma=0 * ones,
        flip=ones < 0,
    )


def normalised(paths: list[Path], views: list[ViewParameters], dtype: torch.dtype) -> list[torch.Tensor]:
    """Both views as the pipeline gives them, (B, SIZE, SIZE, 3)."""
    encoded = [read_image(Sample(path, path.name))[0] for path in paths]
    batches = iter([[encoded, *view_inputs(views[0]), *view_inputs(views[1])]])
    pipeline = train_pipeline(
        lambda: next(batches),
        batch_size=len(paths),
        image_size=SIZE,
        recipe=V2,
        dtype=dtype,
        device=torch.device("cpu"),
        threads=2,
        prefetch=1,
    )
    return [torch.from_numpy(np.array(output.as_tensor())) for output in pipeline.run()]


def pixels(paths: list[Path], views: list[ViewParameters]) -> list[np.ndarray]:
    """Both views in units of 1/255, (B, SIZE, SIZE, 3) float64."""
    return [255 * (out * STD + MEAN).double().numpy() for out in normalised(paths, views, torch.float32)]


def cropped(path: Path, view: ViewParameters, row: int) -> Image.Image:
    """What PIL makes of a view's crop."""
    (top, left), (height, width) = view.start[row].tolist(), view.shape[row].tolist()
    box = (left, top, left + width, top + height)
    image = Image.open(path).convert("RGB").crop(box)
    return image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)


def with_all(view: ViewParameters, **values: float) -> ViewParameters:
    """The view with the same value in every row of the named fields."""
    changes = {name: torch.full_like(getattr(view, name), value) for name, value in values.items()}
    return dataclasses.replace(view, **changes)


def mean_difference(images: np.ndarray, expected: list[Image.Image]) -> float:
    return max(np.abs(a - np.asarray(b, float)).mean() for a, b in zip(images, expected, strict=True))


def test_crop_and_resize_match_pil(photographs: list[Path]) -> None:
    view = neutral(photographs)
    corner = dataclasses.replace(view, start=0 * view.start, shape=view.shape // 4)  # enlarges
    for images, parameters in zip(pixels(photographs, [view, corner]), (view, corner), strict=True):
        expected = [cropped(path, parameters, i) for i, path in enumerate(photographs)]
        assert mean_difference(images, expected) < 1


@pytest.mark.parametrize("name", ["bee/001.jpg", "bee/002.jpg", "cat/002.jpg"])
def test_grey_cmyk_and_exif_rotated_files_match_pil(jpeg_root: Path, name: str) -> None:
    path = jpeg_root / "train" / name
    view = neutral([path])
    images, _ = pixels([path], [view, view])
    assert mean_difference(images, [cropped(path, view, 0)]) < 1


def test_output_is_normalised_whole_numbers(photographs: list[Path]) -> None:
    view = neutral(photographs)
    first, _ = pixels(photographs, [view, view])
    np.testing.assert_allclose(first, first.round(), atol=1e-3)
    assert first.min() >= -1e-3 and first.max() <= 255 + 1e-3 and first.std() > 20


def test_half_precision_is_the_rounded_result(photographs: list[Path]) -> None:
    views = [neutral(photographs)] * 2
    single, _ = normalised(photographs, views, torch.float32)
    half, _ = normalised(photographs, views, torch.float16)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), single, rtol=2**-10, atol=2**-12)


def test_flip_mirrors_exactly(photographs: list[Path]) -> None:
    view = neutral(photographs)
    plain, flipped = pixels(photographs, [view, with_all(view, flip=True)])
    assert np.array_equal(flipped, plain[:, :, ::-1])
    assert not np.array_equal(flipped, plain)


def test_views_and_rows_do_not_touch_each_other(photographs: list[Path]) -> None:
    """One blurred row among unblurred ones: the others keep their bits."""
    view = neutral(photographs)
    sigma = torch.zeros(len(photographs))
    sigma[2] = 1.5
    plain, mixed = pixels(photographs, [view, dataclasses.replace(view, blur_sigma=sigma)])
    same = [np.array_equal(a, b) for a, b in zip(plain, mixed, strict=True)]
    assert same == [i != 2 for i in range(len(photographs))]


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_blur_is_gaussian(photographs: list[Path], sigma: float) -> None:
    view = neutral(photographs)
    plain, blurred = pixels(photographs, [view, with_all(view, blur_sigma=sigma)])
    radius = int(np.ceil(3 * sigma))
    expected = ndimage.gaussian_filter(plain, (0, sigma, sigma, 0), mode="mirror", radius=(0, radius, radius, 0))
    assert np.abs(blurred - expected).max() < 1.01


def test_brightness_contrast_saturation_and_grey_match_torchvision(photographs: list[Path]) -> None:
    view = neutral(photographs)
    plain = [cropped(path, view, i) for i, path in enumerate(photographs)]
    cases: list[tuple[dict[str, float], Callable[[Image.Image], Image.Image]]] = [
        ({"brightness": 1.4}, lambda image: F.adjust_brightness(image, 1.4)),
        ({"brightness": 0.6}, lambda image: F.adjust_brightness(image, 0.6)),
        ({"contrast": 1.4}, lambda image: F.adjust_contrast(image, 1.4)),
        ({"contrast": 0.6}, lambda image: F.adjust_contrast(image, 0.6)),
        ({"saturation": 1.4}, lambda image: F.adjust_saturation(image, 1.4)),
        ({"saturation": 0.6}, lambda image: F.adjust_saturation(image, 0.6)),
        ({"grey": True}, lambda image: F.rgb_to_grayscale(image, 3)),
    ]
    for (values, expected), (other_values, other_expected) in zip(cases, cases[1:] + cases[:1], strict=True):
        first, second = pixels(photographs, [with_all(view, **values), with_all(view, **other_values)])
        assert mean_difference(first, [expected(image) for image in plain]) < 1.5, values
        assert mean_difference(second, [other_expected(image) for image in plain]) < 1.5, other_values


@pytest.mark.parametrize("hue", [0.1, -0.1])
def test_hue_turns_the_same_way_as_torchvision(photographs: list[Path], hue: float) -> None:
    view = neutral(photographs)
    plain = [cropped(path, view, i) for i, path in enumerate(photographs)]
    expected = np.stack([np.asarray(F.adjust_hue(image, hue), float) for image in plain])
    unchanged, turned = pixels(photographs, [view, with_all(view, hue=hue)])
    assert np.abs(turned - expected).mean() < 0.8 * np.abs(unchanged - expected).mean()


def test_hue_keeps_grey_and_turns_red_to_green_in_a_third(photographs: list[Path]) -> None:
    matrix = colour_matrices(with_all(neutral(photographs), hue=1 / 3))[0]
    np.testing.assert_allclose(matrix @ [1, 1, 1], [1, 1, 1], atol=1e-6)
    np.testing.assert_allclose(matrix @ [1, 0, 0], [0, 1, 0], atol=1e-6)


def test_missing_dali_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(UserError, match=r"install the cuda12 or the cuda13 extra.*pip install -e \.\[cuda12\]"):
        dali()
