"""The augmentation on a GPU gives the bits of plain torch on the CPU: the compiled operator, and plain torch itself.

What tests/simt shows of the same kernel in the emulator, and what an emulator cannot show: DALI's memory and streams.
"""

import pytest
import torch
from nvidia.dali import fn
from nvidia.dali.pipeline import pipeline_def
from torch import Tensor

from synco_fast.data.numbers import value_table
from synco_fast.data.operator import Augmentation, status, view_operator
from synco_fast.data.recipes import IMAGENET_MEAN, IMAGENET_STD
from tests.simt.view import Views, differing, random_views, training_views

DEVICE = torch.device("cuda", 0)
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16])


def on_gpu(views: Views, dtype: torch.dtype, *, batches: int = 1, augmentation: Augmentation = "compiled") -> Tensor:
    """What a pipeline makes of decoded images that are on the GPU; of many batches the last, all of them the same."""
    values = value_table(IMAGENET_MEAN, IMAGENET_STD)
    images, numbers = [image.numpy() for image in views.images], views.numbers.numpy()

    @pipeline_def(batch_size=len(images), num_threads=2, device_id=0, exec_dynamic=True)
    def define():  # type: ignore[no-untyped-def]
        decoded = fn.external_source(source=lambda: images, device="gpu", batch=True)
        rows = fn.external_source(source=lambda: numbers, batch=True)
        return view_operator(augmentation, DEVICE, size=views.size, values=values, dtype=dtype)(decoded, rows)

    pipeline = define()
    pipeline.build()
    runs = [torch.from_dlpack(pipeline.run()[0].as_tensor()).cpu() for _ in range(batches)]
    assert all(torch.equal(runs[0], run) for run in runs)
    return runs[-1]


def test_the_operator_is_there() -> None:
    assert status(DEVICE) == "ok"


@every_dtype
def test_training_views(dtype: torch.dtype) -> None:
    """Of the default size."""
    for recipe in ("moco_v2", "moco_v1"):
        views = training_views(32, 224, recipe)
        assert differing(on_gpu(views, dtype), views) == []


@every_dtype
@pytest.mark.parametrize(("size", "n"), [(16, 500), (33, 300), (64, 100), (225, 20)])
def test_random_views(size: int, n: int, dtype: torch.dtype) -> None:
    """More of them than a GPU has multiprocessors, too."""
    views = random_views(n, size, seed=size)
    assert differing(on_gpu(views, dtype), views) == []


def test_many_batches_under_way() -> None:
    views = training_views(64, 224)
    assert differing(on_gpu(views, torch.float16, batches=30), views) == []


def test_plain_torch() -> None:
    for views in (training_views(8, 224), random_views(50, 33, seed=1)):
        assert differing(on_gpu(views, torch.float32, augmentation="plain"), views) == []
