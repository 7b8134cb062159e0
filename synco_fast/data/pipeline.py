"""DALI pipelines: encoded bytes and per-sample numbers in, normalised channels-last images out.

One definition serves the CPU and the GPU (`mixed` decoding). The pipelines hold no state and draw nothing: order and
parameters come from outside through `external_source`. After decoding, one operator does all that makes a view:
crop, resize, colour, blur, flip, normalise and cast, with the bits that torchvision gives on PIL images
(docs/data.md says what is compared, and how).
"""

from collections.abc import Callable
from typing import Any

import torch

from synco_fast.data.numbers import value_table
from synco_fast.data.operator import Augmentation, dali, view_operator
from synco_fast.data.recipes import IMAGENET_MEAN, IMAGENET_STD, Recipe

Arrays = list[Any]  # one entry per pipeline input: a (B, ...) array, or a list of B arrays for encoded bytes
Source = Callable[[], Arrays]


def train_pipeline(source: Source, *, recipe: Recipe, views: int, **settings: Any) -> Any:
    """Pipeline of so many views per image; its outputs are as many (B, image_size, image_size, 3) batches.

    Args:
        source: called once per batch; returns a list of B encoded images and a (B, VIEW_NUMBERS) array for each view.
            StopIteration ends the stream.
        recipe: says the normalisation.
        settings: those of `_pipeline`.
    """
    return _pipeline(source, views, mean=recipe.mean, std=recipe.std, **settings)


def evaluation_pipeline(source: Source, **settings: Any) -> Any:
    """Pipeline of one (B, image_size, image_size, 3) batch; as `train_pipeline`, but for one array of numbers."""
    return _pipeline(source, 1, mean=IMAGENET_MEAN, std=IMAGENET_STD, **settings)


def _pipeline(
    source: Source,
    views: int,
    *,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    batch_size: int,
    image_size: int,
    dtype: torch.dtype,
    augmentation: Augmentation,
    device: torch.device,
    threads: int,
    prefetch: int,
) -> Any:
    """Decode, and make so many views.

    Args:
        batch_size: at most this many samples per batch.
        image_size: height and width of a view, pixels.
        mean, std: of the normalisation.
        dtype: torch.float32 or torch.float16.
        augmentation: which implementation of the operator, see `operator.resolve`.
        device: where decoding (GPU: hybrid), augmentation and outputs live.
        threads: DALI's CPU threads.
        prefetch: batches prepared ahead.
    """
    fn, _, pipeline_def = dali()
    make_view = view_operator(augmentation, device, size=image_size, values=value_table(mean, std), dtype=dtype)

    @pipeline_def(
        batch_size=batch_size,
        num_threads=threads,
        device_id=_gpu_number(device) if device.type == "cuda" else None,
        prefetch_queue_depth=prefetch,
        exec_dynamic=True,  # outputs own their memory, so torch may keep them
    )
    def define() -> Any:
        encoded, *numbers = fn.external_source(source=source, num_outputs=1 + views, batch=True)
        images = decode(encoded, device)
        return tuple(make_view(images, one) for one in numbers)

    pipeline = define()
    pipeline.build()
    return pipeline


def decode(encoded: Any, device: torch.device, **options: Any) -> Any:
    """Encoded images to (H, W, 3) uint8; options are more of `fn.decoders.image`'s."""
    fn, types, _ = dali()
    return fn.decoders.image(
        encoded,
        device="mixed" if device.type == "cuda" else "cpu",
        output_type=types.RGB,
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,  # so that the GPU gives the CPU's pixels
        **options,
    )


def _gpu_number(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
