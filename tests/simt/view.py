"""Runs the augmentation's CUDA kernel in the emulator, on views drawn at random, and compares with plain torch."""

import os
import random
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from synco_fast.data.numbers import COLOUR_STEPS, HUE, NOTHING, _box_blur, value_table, view_numbers
from synco_fast.data.plain_view import make_view
from synco_fast.data.recipes import IMAGENET_MEAN, IMAGENET_STD, RECIPES
from synco_fast.data.views import view_parameters
from tests.simt.build import REPOSITORY, build

KERNEL = REPOSITORY / "kernels/augment/view.cu"
MAIN = REPOSITORY / "tests/simt/view_main.cpp"
FLAGS = ("-ffp-contract=off",)
BRIGHTNESS, CONTRAST, SATURATION = range(3)


@dataclass(frozen=True)
class Views:
    """Decoded images, (h, w, 3) uint8, and a row of numbers for each."""

    images: Sequence[Tensor]
    numbers: Tensor
    size: int


def program(variant: str = "plain") -> Path:
    """The kernel as it is."""
    return build([KERNEL, MAIN], variant, flags=FLAGS)


def random_views(n: int, size: int, seed: int, *, steps: Sequence[Sequence[int]] | None = None) -> Views:
    """Crops from a single pixel up to 90 x 120, enlarged and reduced, half of them seen through a window.

    Args:
        n: how many.
        size: of the views, pixels.
        steps: colour operations of each view; without them, drawn.
    """
    draw = random.Random(seed)
    images, rows = [], []
    for i in range(n):
        height, width = draw.choice([(1, 1), (draw.randint(1, 90), draw.randint(1, 120))])
        image = random_image(draw, height + draw.randint(0, 5), width + draw.randint(0, 5))
        top, left = draw.randint(0, len(image) - height), draw.randint(0, image.shape[1] - width)
        resized = [size + draw.choice([0, draw.randint(0, 40)]) for _ in range(2)]
        window = [draw.randint(0, side - size) for side in resized]
        blur = _box_blur(torch.tensor([draw.choice([0.0, draw.uniform(0.1, 2.9)])]))[0].tolist()
        kinds = steps[i] if steps else [draw.randint(NOTHING, COLOUR_STEPS - 1) for _ in range(COLOUR_STEPS)]
        colours = [(kind, draw.randint(0, 255) if kind == HUE else draw.uniform(0.0, 2.2)) for kind in kinds]
        rows.append([top, left, height, width, *resized, *window, draw.randint(0, 1), *blur, *sum(colours, ())])
        images.append(image)
    return Views(images, torch.tensor(rows, dtype=torch.float32), size)


def random_image(draw: random.Random, height: int, width: int) -> Tensor:
    """Noise, all of it or of few values, so that equal channels, white and black are there too."""
    generator = torch.Generator().manual_seed(draw.getrandbits(32))
    values = torch.randint(256, (draw.choice([2, 256]),), generator=generator, dtype=torch.uint8)
    values = draw.choice([values, torch.tensor([0, 255], dtype=torch.uint8)])
    return values[torch.randint(len(values), (height, width, 3), generator=generator)]


def call(
    program: Path, views: Views, dtype: torch.dtype, *, processors: int = 3, schedule: str = "fwd"
) -> tuple[subprocess.CompletedProcess[str], bytes]:
    """The finished program, and what it wrote."""
    values = value_table(IMAGENET_MEAN, IMAGENET_STD).to(dtype)
    shapes = torch.tensor([image.shape[:2] for image in views.images])
    parts = [values.view(torch.uint8), views.numbers.view(torch.uint8), shapes.view(torch.uint8), *views.images]
    header = struct.pack("<4q", len(views.images), views.size, dtype == torch.float16, processors)
    environment = {**os.environ, "SIMT_SCHED": schedule, "SIMT_TIMEOUT": "100", "ASAN_OPTIONS": "detect_leaks=0"}
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "input", Path(folder) / "output"
        source.write_bytes(b"".join((header, *(bytes(part.numpy()) for part in parts))))
        done = subprocess.run(
            [str(program), str(source), str(target)],
            capture_output=True,
            text=True,
            env=environment,
            timeout=200,
            check=False,
        )
        return done, target.read_bytes() if target.exists() else b""


def wrong_views(
    program: Path, views: Views, dtype: torch.dtype = torch.float32, *, processors: int = 3, schedule: str = "fwd"
) -> list[int]:
    """See `differing`. The program must succeed."""
    done, output = call(program, views, dtype, processors=processors, schedule=schedule)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), done.stdout + done.stderr
    return differing(torch.frombuffer(bytearray(output), dtype=dtype).view(-1, views.size, views.size, 3), views)


def differing(made: Tensor, views: Views) -> list[int]:
    """Indices of those that are not, bit for bit, what plain torch makes on the CPU."""
    assert len(made) == len(views.images)
    values = value_table(IMAGENET_MEAN, IMAGENET_STD).to(made.dtype)
    return [
        i
        for i, (image, numbers) in enumerate(zip(views.images, views.numbers, strict=True))
        if not torch.equal(made[i], make_view(image, numbers, views.size, values))
    ]


def training_views(n: int, size: int, recipe: str = "moco_v2") -> Views:
    """As the loader asks for them, of noise in a photograph's sizes."""
    generator = torch.Generator().manual_seed(2)
    sizes = torch.tensor([(375, 500), (500, 333)])[torch.arange(n) % 2]
    images = [torch.randint(256, (*shape, 3), generator=generator, dtype=torch.uint8) for shape in sizes.tolist()]
    parameters = view_parameters(sizes, RECIPES[recipe], 11, 4, torch.arange(n), 0)
    return Views(images, view_numbers(parameters, RECIPES[recipe], size), size)
