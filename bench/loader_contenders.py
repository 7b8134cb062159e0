"""What fills a batch, as the contenders of bench.loader: ours, torchvision's DataLoader, DALI as its users write it."""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from bench.torchvision_views import torchvision_recipe
from synco_fast.data.index import Index
from synco_fast.data.loader import TrainLoader
from synco_fast.data.operator import Augmentation, dali
from synco_fast.data.pipeline import decode
from synco_fast.data.recipes import Recipe
from synco_fast.data.stream import Request, Stream, read_all


@dataclass(frozen=True)
class Setting:
    """What all contenders do alike.

    Attributes:
        index: the images.
        recipe: of the two views.
        batch: images per batch.
        size: height and width of a view, pixels.
        threads: CPU threads of a pipeline, or workers of a DataLoader.
        prefetch: batches made ahead.
        dtype: of the views.
        device: of the views.
    """

    index: Index
    recipe: Recipe
    batch: int
    size: int
    threads: int
    prefetch: int
    dtype: torch.dtype
    device: torch.device


Batches = Iterator[Any]
_REPEATS = 1000


class Contender(NamedTuple):
    """Endless batches of a setting; closing the generator stops what makes them."""

    batches: Callable[[Setting], Batches]
    needs_files: bool = False
    needs_gpu: bool = False


def ours(augmentation: Augmentation) -> Callable[[Setting], Batches]:
    """The loader of `synco-fast pretrain`."""

    def batches(setting: Setting) -> Batches:
        loader = TrainLoader(
            setting.index,
            batch_size=setting.batch,
            image_size=setting.size,
            recipe=setting.recipe,
            seed=0,
            dtype=setting.dtype,
            augmentation=augmentation,
            device=setting.device,
            threads=setting.threads,
            prefetch=setting.prefetch,
        )
        with closing(loader):
            yield from loader

    return batches


def read_only(setting: Setting) -> Batches:
    """Our loader's files and headers, one batch after another on one thread."""
    for rows in _endless_rows(setting):
        yield read_all([setting.index.sample(i) for i in rows])


def read_and_decode(**options: Any) -> Callable[[Setting], Batches]:
    """Our loader without views: decoded images stay in DALI. Options are those of its decoder."""

    def batches(setting: Setting) -> Batches:
        chosen = ([setting.index.sample(i) for i in rows] for rows in _endless_rows(setting))
        stream = Stream(
            partial(_decoder, setting, options),
            (Request(samples, lambda sizes: []) for samples in chosen),
            device=setting.device,
            threads=setting.threads,
            prefetch=setting.prefetch,
        )
        with closing(stream):
            yield from stream

    return batches


def _decoder(setting: Setting, options: dict[str, Any], source: Callable[[], Any]) -> Any:
    fn, _, pipeline_def = dali()

    @pipeline_def(
        batch_size=setting.batch,
        num_threads=setting.threads,
        device_id=None if setting.device.type == "cpu" else 0,
        prefetch_queue_depth=setting.prefetch,
        exec_dynamic=True,
    )
    def define() -> Any:
        [encoded] = fn.external_source(source=source, num_outputs=1, batch=True)
        return decode(encoded, setting.device, **options).shape()

    pipeline = define()
    pipeline.build()
    return pipeline


def torchvision_loader(setting: Setting) -> Batches:
    """A DataLoader with as many workers: PIL decodes once, torchvision makes both views."""
    dataset = TwoViews(setting)
    workers = DataLoader(
        dataset,
        batch_size=setting.batch,
        shuffle=True,
        drop_last=True,
        num_workers=setting.threads,
        prefetch_factor=setting.prefetch,
        persistent_workers=True,
        pin_memory=setting.device.type == "cuda",
    )
    while True:
        for views in workers:
            yield [view.to(setting.device, setting.dtype, non_blocking=True) for view in views]


class TwoViews(Dataset[list[torch.Tensor]]):
    """Each image many times over, as a DataLoader stands still between epochs, which are long in earnest."""

    def __init__(self, setting: Setting) -> None:
        self._paths = [setting.index.path(i) for i in range(len(setting.index))]
        self._augment = torchvision_recipe(setting.recipe, setting.size)

    def __len__(self) -> int:
        return _REPEATS * len(self._paths)

    def __getitem__(self, i: int) -> list[torch.Tensor]:
        image = Image.open(self._paths[i % len(self._paths)]).convert("RGB")
        return [self._augment(image), self._augment(image)]


def dali_chain(
    *, decode_twice: bool = False, jitter_first: bool = False, float_colours: bool = False
) -> Callable[[Setting], Batches]:
    """DALI's own operators: colour by color_twist and blur by gaussian_blur, neither of which is torchvision's.

    Args:
        decode_twice: decode the region of each view's crop, in place of the whole image once.
        jitter_first: change colours of the crop before it is resized.
        float_colours: from there on in float32, in place of 8 bits.
    """

    def batches(setting: Setting) -> Batches:
        from nvidia.dali.plugin.pytorch import DALIGenericIterator

        pipeline = _chain(setting, decode_twice, jitter_first, float_colours)
        for batch in DALIGenericIterator([pipeline], ["query", "key"]):
            yield batch[0]["query"], batch[0]["key"]

    return batches


def _chain(setting: Setting, decode_twice: bool, jitter_first: bool, float_colours: bool) -> Any:
    fn, types, pipeline_def = dali()
    recipe, gpu = setting.recipe, setting.device.type == "cuda"
    decoder = "mixed" if gpu else "cpu"
    colours = types.FLOAT if float_colours else types.UINT8
    area = {"random_area": recipe.crop_scale, "random_aspect_ratio": recipe.crop_ratio}

    def jitter(images: Any) -> Any:
        applied = fn.random.coin_flip(probability=recipe.jitter_probability)
        kept = 1 - fn.random.coin_flip(probability=recipe.grey_probability)
        strengths = (recipe.brightness, recipe.contrast, recipe.saturation)
        factors = [1 + applied * fn.random.uniform(range=(-x, x)) for x in strengths]
        hue = applied * fn.random.uniform(range=(-360 * recipe.hue, 360 * recipe.hue))
        saturation = kept * factors[2]
        return fn.color_twist(
            images, brightness=factors[0], contrast=factors[1], saturation=saturation, hue=hue, dtype=colours
        )

    def view(encoded: Any, images: Any) -> Any:
        if decode_twice:
            images = fn.decoders.image_random_crop(encoded, device=decoder, output_type=types.RGB, **area)
        if jitter_first:
            images = jitter(images)
        resize = fn.resize if decode_twice else fn.random_resized_crop
        images = resize(images, size=(setting.size, setting.size), antialias=True, **({} if decode_twice else area))
        if not jitter_first:
            images = jitter(images)
        if fn.random.coin_flip(probability=recipe.blur_probability, dtype=types.BOOL):
            images = fn.gaussian_blur(images, sigma=fn.random.uniform(range=recipe.blur_sigma))
        return fn.crop_mirror_normalize(
            images,
            mirror=fn.random.coin_flip(probability=recipe.flip_probability),
            mean=[255 * x for x in recipe.mean],
            std=[255 * x for x in recipe.std],
            dtype=types.FLOAT16 if setting.dtype == torch.float16 else types.FLOAT,
            output_layout="HWC",
        )

    @pipeline_def(
        batch_size=setting.batch,
        num_threads=setting.threads,
        device_id=0 if gpu else None,
        prefetch_queue_depth=setting.prefetch,
        enable_conditionals=True,
        seed=0,
    )
    def define() -> Any:
        files = [str(setting.index.path(i)) for i in range(len(setting.index))]
        encoded, _ = fn.readers.file(files=files, random_shuffle=True)
        images = None if decode_twice else fn.decoders.image(encoded, device=decoder, output_type=types.RGB)
        return view(encoded, images), view(encoded, images)

    pipeline = define()
    pipeline.build()
    return pipeline


def _endless_rows(setting: Setting) -> Iterator[list[int]]:
    n, start = len(setting.index), 0
    while True:
        yield [(start + i) % n for i in range(setting.batch)]
        start = (start + setting.batch) % n


CONTENDERS = {
    "synco_fast": Contender(ours("auto")),
    "plain": Contender(ours("plain")),
    "read": Contender(read_only),
    "read_decode": Contender(read_and_decode()),
    "read_decode_without_hardware": Contender(read_and_decode(hw_decoder_load=0.0), needs_gpu=True),
    "read_decode_cached": Contender(read_and_decode(cache_size=8192, cache_type="largest"), needs_gpu=True),
    "torchvision": Contender(torchvision_loader, needs_files=True),
    "dali_chain": Contender(dali_chain(), needs_files=True),
    "dali_chain_decode_twice": Contender(dali_chain(decode_twice=True), needs_files=True),
    "dali_chain_jitter_first": Contender(dali_chain(jitter_first=True), needs_files=True),
    "dali_chain_float_colours": Contender(dali_chain(float_colours=True), needs_files=True),
}
"""bench/README.md says what each is."""
