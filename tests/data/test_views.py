"""View parameters: their distributions, and that nothing but the place in the epoch decides them."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import RandomResizedCrop

from synco_fast.data.recipes import RECIPES, Recipe
from synco_fast.data.views import ViewParameters, view_parameters

N = 6000
P_VALUE = 1e-3  # seeds are fixed, so a test passes always or never
V2 = RECIPES["moco_v2"]
FIELDS = [field.name for field in dataclasses.fields(ViewParameters)]


def draw(recipe: Recipe = V2, size: tuple[int, int] = (375, 500), n: int = N, view: int = 0) -> ViewParameters:
    return view_parameters(torch.tensor([size]).expand(n, 2), recipe, 11, 4, torch.arange(n), view)


def assert_uniform(values: torch.Tensor, low: float, high: float) -> None:
    assert stats.kstest(values.double().numpy(), "uniform", (low, high - low)).pvalue > P_VALUE


def assert_share(flags: torch.Tensor, probability: float) -> None:
    assert stats.binomtest(int(flags.sum()), len(flags), probability).pvalue > P_VALUE


def test_moco_v2_distributions() -> None:
    views = draw()
    assert_share(views.jittered, 0.8)
    for factor in (views.brightness, views.contrast, views.saturation):
        assert_uniform(factor, 0.6, 1.4)
        assert_uniform(factor[views.jittered], 0.6, 1.4)
    assert_uniform(views.hue, -0.1, 0.1)
    assert_share(views.grey, 0.2)
    assert_share(views.flip, 0.5)
    assert_share(views.blur_sigma > 0, 0.5)
    assert_uniform(views.blur_sigma[views.blur_sigma > 0], 0.1, 2.0)


def test_moco_v1_always_jitters_and_never_blurs() -> None:
    views = draw(RECIPES["moco_v1"])
    assert views.jittered.all()
    for factor in (views.brightness, views.contrast, views.saturation):
        assert_uniform(factor, 0.6, 1.4)
    assert_uniform(views.hue, -0.4, 0.4)
    assert_share(views.grey, 0.2)
    assert not views.blur_sigma.any()


def test_jitter_orders_are_permutations_equally_often() -> None:
    order = draw().jitter_order
    assert torch.equal(order.sort(dim=1).values, torch.arange(4).expand(N, 4))
    counts = torch.bincount(order @ torch.tensor([64, 16, 4, 1]))
    counts = counts[counts > 0]
    assert len(counts) == 24
    assert stats.chisquare(counts.numpy()).pvalue > P_VALUE


@pytest.mark.parametrize("size", [(375, 500), (600, 150), (32, 32)])
def test_crop_follows_torchvision(size: tuple[int, int]) -> None:
    views = draw(size=size)
    torch.manual_seed(0)
    image = torch.empty(3, *size)
    expected = np.array(
        [RandomResizedCrop.get_params(image, list(V2.crop_scale), list(V2.crop_ratio)) for _ in range(N)]
    )
    ours = torch.cat([views.start, views.shape], dim=1).numpy()
    assert (views.start >= 0).all() and (views.shape >= 1).all()
    assert (views.start + views.shape <= torch.tensor(size)).all()
    for quantity in (
        lambda crop: crop[:, 2] * crop[:, 3],
        lambda crop: crop[:, 2] / crop[:, 3],
        lambda crop: crop[:, 0],
        lambda crop: crop[:, 1],
    ):
        assert stats.ks_2samp(quantity(ours), quantity(expected)).pvalue > P_VALUE


@pytest.mark.parametrize("size", [(10, 1000), (1000, 10), (1, 50), (50, 1), (1, 1)])
def test_crop_falls_back_to_torchvisions_centre(size: tuple[int, int]) -> None:
    # Nothing of at least 90% of the area fits in these sizes, but for the single pixel.
    recipe = dataclasses.replace(V2, crop_scale=(0.9, 1.0))
    views = draw(recipe, size, n=20)
    expected = RandomResizedCrop.get_params(torch.empty(3, *size), list(recipe.crop_scale), list(recipe.crop_ratio))
    ours = torch.cat([views.start, views.shape], dim=1)
    assert ours.tolist() == [list(expected)] * 20


def test_parameters_depend_on_nothing_but_the_place() -> None:
    rng = np.random.default_rng(0)
    sizes = torch.from_numpy(rng.integers(30, 600, (64, 2)))
    whole = view_parameters(sizes, V2, 3, 9, torch.arange(640, 704), 1)
    rows = torch.from_numpy(rng.permutation(64)[:17])
    part = view_parameters(sizes[rows], V2, 3, 9, rows + 640, 1)
    for name in FIELDS:
        assert torch.equal(getattr(whole, name)[rows], getattr(part, name)), name


def test_seed_epoch_position_and_view_all_matter() -> None:
    sizes = torch.full((500, 2), 224)
    positions = torch.arange(500)
    base = view_parameters(sizes, V2, 3, 9, positions, 0)
    others = [
        view_parameters(sizes, V2, 4, 9, positions, 0),
        view_parameters(sizes, V2, 3, 10, positions, 0),
        view_parameters(sizes, V2, 3, 9, positions + 500, 0),
        view_parameters(sizes, V2, 3, 9, positions, 1),
    ]
    for other in others:
        pairs = torch.stack([base.brightness, other.brightness])
        assert (pairs[0] == pairs[1]).sum() < 3
        assert abs(torch.corrcoef(pairs)[0, 1]) < 0.2
