"""Real JPEG files of many sizes and kinds, made once per run."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CLASSES = ("ant", "bee", "cat", "dog")
PER_CLASS = 15
ORIENTATION = 0x0112


def photograph(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """A picture with the smooth colours and the edges of a photograph."""
    coarse = rng.integers(20, 236, (7, 9, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    for _ in range(4):
        top, left = rng.integers(0, height), rng.integers(0, width)
        patch = Image.new("RGB", (width // 4, height // 5), tuple(rng.integers(0, 256, 3).tolist()))
        image.paste(patch, (int(left), int(top)))
    return image


@pytest.fixture(scope="session")
def jpeg_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 files train/<class>/*.jpg, some greyscale, one CMYK, one EXIF-rotated; and 12 in val/<class>/."""
    root = tmp_path_factory.mktemp("jpegs")
    rng = np.random.default_rng(0)
    for split, count in (("train", PER_CLASS), ("val", 3)):
        for name in CLASSES:
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                height, width = rng.integers(40, 200, 2).tolist()
                image = photograph(rng, height, width)
                if i == 1:
                    image = image.convert("L")
                if (name, i) == ("bee", 2):
                    image = image.convert("CMYK")
                exif = image.getexif()
                if (name, i) == ("cat", 2):
                    exif[ORIENTATION] = 6
                image.save(folder / f"{i:03}.jpg", quality=int(rng.integers(70, 96)), exif=exif)
    return root


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Six RGB JPEG files of about 250 pixels, in a flat folder."""
    root = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(1)
    paths = [root / f"{i}.jpg" for i in range(6)]
    for i, path in enumerate(paths):
        photograph(rng, 250 + 7 * i, 300 - 11 * i).save(path, quality=92)
    return paths
