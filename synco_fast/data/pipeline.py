"""DALI pipelines: encoded bytes and per-sample parameters in, normalised channels-last images out.

One definition serves the CPU and the GPU (`mixed` decoding). The pipelines hold no state and draw nothing:
order and parameters come from outside through `external_source`.

Training, per view: crop -> resize -> brightness and contrast -> saturation, hue and grey -> blur -> flip,
normalise, cast. Cropping, resizing (bilinear with antialiasing), flipping and normalising follow torchvision
on PIL images to within rounding. Colour does not follow `ColorJitter` exactly:

- The order is fixed; `ViewParameters.jitter_order` is not used. Brightness, contrast and saturation commute
  up to clamping, so this matters where they saturate.
- Brightness and contrast are one step with one clamp and one rounding to 8 bits. Contrast pivots on the
  image's own mean grey, as in torchvision, but before the clamp of brightness and not rounded to an integer.
- Saturation, hue and grey are one 3 x 3 matrix with one clamp. Saturation and grey use torchvision's luma
  weights; hue is a linear rotation about the grey axis, not a shift in HSV.
- MoCo v1 turns views grey before the jitter; here it is after it, which differs only where values saturate.
- The blur's kernel is a Gaussian cut at 3 sigma with mirrored borders; PIL's is a threefold box blur.

Measured on 200 ImageNet JPEGs at 224 px: the jitter changes a pixel by 25/255 on average, and the result is
3.5/255 from that of `ColorJitter` with the same parameters in their drawn order, 1.6/255 without hue.
"""

import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from synco_fast.data.recipes import IMAGENET_MEAN, IMAGENET_STD, Recipe
from synco_fast.data.views import ViewParameters
from synco_fast.errors import UserError

Arrays = list[Any]  # one entry per pipeline input: a (B, ...) array, or a list of B arrays for encoded bytes
Source = Callable[[], Arrays]

_LUMA = np.array([0.299, 0.587, 0.114])
_VIEW_INPUTS = 8
_EVALUATION_INPUTS = 3


def dali() -> tuple[ModuleType, ModuleType, Any]:
    """DALI's `fn`, `types` and `pipeline_def`.

    Raises:
        UserError: DALI is not installed or cannot be loaded.
    """
    try:
        from nvidia.dali import fn, types
        from nvidia.dali.pipeline import pipeline_def
    except ImportError as error:
        raise UserError(
            f"NVIDIA DALI, which loads the images, cannot be imported ({error}); install the cuda12 or the "
            "cuda13 extra, never both: pip install -e .[cuda12]  (it also runs on machines without a GPU)"
        ) from error
    return fn, types, pipeline_def


def train_pipeline(
    source: Source,
    *,
    batch_size: int,
    image_size: int,
    recipe: Recipe,
    dtype: torch.dtype,
    device: torch.device,
    threads: int,
    prefetch: int,
) -> Any:
    """Pipeline of two views per image; its outputs are two (B, image_size, image_size, 3) batches.

    Args:
        source: called once per batch; returns a list of B encoded images followed by `view_inputs` of each
            view. StopIteration ends the stream.
        batch_size: at most this many samples per batch.
        image_size: height and width of a view, pixels.
        recipe: says which steps are needed at all, and the normalisation.
        dtype: torch.float32 or torch.float16.
        device: where decoding (GPU: hybrid), augmentation and outputs live.
        threads: DALI's CPU threads.
        prefetch: batches prepared ahead.
    """
    fn, types, pipeline_def = dali()
    normalise = _normalise(recipe.mean, recipe.std, dtype)

    def view(images: Any, inputs: Sequence[Any]) -> Any:
        start, shape, brightness, contrast, matrix, blurred, sigma, flip = inputs
        images = fn.slice(images, start=start, shape=shape, axes=(0, 1))
        images = fn.resize(images, size=(image_size, image_size), interp_type=types.INTERP_LINEAR, antialias=True)
        grey = fn.color_space_conversion(images, image_type=types.RGB, output_type=types.GRAY)
        images = fn.brightness_contrast(
            images,
            brightness=brightness,
            contrast=contrast,
            # Arguments are read on the CPU, so on a GPU this one scalar per sample travels back.
            contrast_center=fn.reductions.mean(grey).cpu(),
        )
        images = fn.coord_transform(images, M=matrix, dtype=types.UINT8)
        if blurred:
            images = fn.gaussian_blur(images, sigma=sigma)
        return normalise(images, mirror=flip)

    @pipeline_def(enable_conditionals=True, **_execution(batch_size, device, threads, prefetch))
    def define() -> Any:
        encoded, *inputs = fn.external_source(source=source, num_outputs=1 + 2 * _VIEW_INPUTS, batch=True)
        images = _decode(encoded, device)
        return view(images, inputs[:_VIEW_INPUTS]), view(images, inputs[_VIEW_INPUTS:])

    pipeline = define()
    pipeline.build()
    return pipeline


def evaluation_pipeline(
    source: Source,
    *,
    batch_size: int,
    image_size: int,
    dtype: torch.dtype,
    device: torch.device,
    threads: int,
    prefetch: int,
) -> Any:
    """Pipeline of resized and centre-cropped images; its output is one (B, image_size, image_size, 3) batch.

    Args:
        source: as for `train_pipeline`, with `evaluation_inputs` after the encoded images.
        Others: as for `train_pipeline`.
    """
    fn, types, pipeline_def = dali()
    normalise = _normalise(IMAGENET_MEAN, IMAGENET_STD, dtype)

    @pipeline_def(**_execution(batch_size, device, threads, prefetch))
    def define() -> Any:
        encoded, size, start = fn.external_source(source=source, num_outputs=_EVALUATION_INPUTS, batch=True)
        images = _decode(encoded, device)
        images = fn.resize(images, size=size, interp_type=types.INTERP_LINEAR, antialias=True)
        images = fn.slice(images, start=start, shape=(image_size, image_size), axes=(0, 1))
        return normalise(images, mirror=0)

    pipeline = define()
    pipeline.build()
    return pipeline


def view_inputs(parameters: ViewParameters) -> Arrays:
    """One view's parameters as the arrays that `train_pipeline` takes for it."""
    blurred = parameters.blur_sigma > 0
    return [
        parameters.start.int().numpy(),
        parameters.shape.int().numpy(),
        parameters.brightness.numpy(),
        parameters.contrast.numpy(),
        colour_matrices(parameters).astype(np.float32),
        blurred.numpy(),
        parameters.blur_sigma.numpy(),
        parameters.flip.int().numpy(),
    ]


def evaluation_inputs(sizes: Tensor, resize: int, image_size: int) -> Arrays:
    """Resized shapes and crop starts, each (B, 2), as torchvision's Resize and CenterCrop choose them.

    Args:
        sizes: (B, 2) int64, height and width of each decoded image.
        resize: length of the shorter side after resizing, at least image_size.
        image_size: height and width of the crop.
    """
    shorter = sizes.amin(dim=1, keepdim=True)
    resized = resize * sizes // shorter
    start = torch.round((resized - image_size) / 2)
    return [resized.float().numpy(), start.int().numpy()]


def colour_matrices(parameters: ViewParameters) -> np.ndarray:
    """Saturation, then hue, then grey, as (B, 3, 3) float64 matrices on RGB columns."""
    grey = np.broadcast_to(_LUMA, (3, 3))
    saturation = parameters.saturation.double().numpy()[:, None, None]
    matrices = saturation * np.eye(3) + (1 - saturation) * grey
    matrices = _hue_rotations(parameters.hue.double().numpy()) @ matrices
    return np.where(parameters.grey.numpy()[:, None, None], grey @ matrices, matrices)


def _hue_rotations(turns: np.ndarray) -> np.ndarray:
    """Rotations about the grey axis by (B,) turns, red towards green: (B, 3, 3), by Rodrigues' formula."""
    angle = 2 * math.pi * turns[:, None, None]
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * (cross @ cross)


def _decode(encoded: Any, device: torch.device) -> Any:
    fn, types, _ = dali()
    return fn.decoders.image(
        encoded,
        device="mixed" if device.type == "cuda" else "cpu",
        output_type=types.RGB,
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,  # so that the GPU gives the CPU's pixels
    )


def _normalise(mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Callable[..., Any]:
    fn, types, _ = dali()

    def normalise(images: Any, mirror: Any) -> Any:
        return fn.crop_mirror_normalize(
            images,
            mirror=mirror,
            mean=[255 * x for x in mean],
            std=[255 * x for x in std],
            dtype={torch.float32: types.FLOAT, torch.float16: types.FLOAT16}[dtype],
            output_layout="HWC",
        )

    return normalise


def _execution(batch_size: int, device: torch.device, threads: int, prefetch: int) -> dict[str, Any]:
    return {
        "batch_size": batch_size,
        "num_threads": threads,
        "device_id": _gpu_number(device) if device.type == "cuda" else None,
        "prefetch_queue_depth": prefetch,
        "exec_dynamic": True,  # outputs own their memory, so torch may keep them
    }


def _gpu_number(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
