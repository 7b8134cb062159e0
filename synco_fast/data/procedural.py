"""The demo's data set: JPEG images of ten patterns, told apart by shape and texture alone.

An image is one pattern, seen at a random scale, stretch, rotation and offset, that chooses at every pixel between two
smooth colour fields. Colours are drawn over the whole hue circle and vary *within* an image, as lightness does, and
which field is the lighter one is a coin toss: so neither pixels nor colour statistics tell the class, and two crops
of one image share little but the pattern, which is what contrastive learning then has to find.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from synco_fast.errors import UserError

Array = NDArray[np.floating[Any]]
Pattern = Callable[[Array, Array, np.random.Generator], Array]

_DRAWING = 1  # raise it when the images of the same seed change
_RECORD = "demo.json"
_SPLITS = ("train", "val")

_SIDE = (72, 128)  # pixels, both included
_JPEG_QUALITY = (60, 95)  # both included
_PERIOD = (0.13, 0.26)  # of the shorter side
_STRETCH = 1.22  # at most, along x and inversely along y
_OFFSET = 10.0  # periods
_COLOUR_GRID = (2, 4)  # random colours per side of a colour field, both included
_LIGHTNESS = (0.42, 0.58)  # of both fields together
_CONTRAST = (0.2, 0.4)  # half the difference in luminance between the fields
_NOISE = 0.04  # at most, standard deviation
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def write_demo_set(
    root: Path,
    *,
    train: int = 3000,
    val: int = 500,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write `root/train/<class>/<number>.jpg` and `root/val/<class>/<number>.jpg`, every class equally often.

    An image is a function of (seed, split, class, number) only. The folder appears complete or not at all; a set
    of the same parameters is left alone.

    Args:
        root: folder of the set; it may exist if it is empty or holds such a set.
        train, val: number of images of a split, a multiple of the number of classes.
        seed: 0 or more.
        progress: called with (images written, images in all) after each.

    Raises:
        UserError: the numbers do not fit, the folder holds something else, or it cannot be written.
    """
    for name, value in (("train", train), ("val", val)):
        if value < len(CLASSES) or value % len(CLASSES):
            raise UserError(f"{name} = {value}: images must divide evenly; use a multiple of {len(CLASSES)} above 0")
    if seed < 0:
        raise UserError(f"seed = {seed}: use 0 or more")
    parameters = {"drawing": _DRAWING, "train": train, "val": val, "seed": seed}
    try:
        if root.exists() and not (root.is_dir() and not any(root.iterdir())):
            _check_existing(root, parameters)
        else:
            _write(root, parameters, progress)
    except OSError as error:
        raise UserError(f"{root}: cannot write the demo images: {error.strerror or error}") from error


def draw(label: int, rng: np.random.Generator) -> Image.Image:
    """An RGB image of class `label`, with sides of 72 to 128 pixels."""
    height, width = (int(side) for side in rng.integers(_SIDE[0], _SIDE[1], 2, endpoint=True))
    mask = _mask(_PATTERNS[CLASSES[label]], height, width, rng)
    nodes = int(rng.integers(*_COLOUR_GRID, endpoint=True))
    lightness = rng.uniform(*_LIGHTNESS, (nodes, nodes))
    contrast = rng.uniform(*_CONTRAST) * rng.choice((-1, 1))
    ground = _enlarge(_colours(lightness - contrast, rng), height, width)
    figure = _enlarge(_colours(lightness + contrast, rng), height, width)
    pixels = ground + mask[..., None] * (figure - ground)
    pixels += np.float32(rng.uniform(0, _NOISE)) * rng.standard_normal(pixels.shape, np.float32)
    return Image.fromarray((pixels.clip(0, 1) * 255 + 0.5).astype(np.uint8))


def _write(root: Path, parameters: dict[str, int], progress: Callable[[int, int], None] | None) -> None:
    """Write the set beside its place, then rename it: a run that is killed leaves no half of a set.

    The temporary name is fixed, so the next run takes over what a killed one left.
    """
    total = parameters["train"] + parameters["val"]
    written = 0
    temporary = root.with_name(f".{root.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        for split_number, split in enumerate(_SPLITS):
            for label, name in enumerate(CLASSES):
                folder = temporary / split / name
                folder.mkdir(parents=True)
                for number in range(parameters[split] // len(CLASSES)):
                    rng = np.random.default_rng((parameters["seed"], split_number, label, number))
                    quality = int(rng.integers(*_JPEG_QUALITY, endpoint=True))
                    draw(label, rng).save(folder / f"{number:04d}.jpg", quality=quality)
                    written += 1
                    if progress is not None:
                        progress(written, total)
        (temporary / _RECORD).write_text(json.dumps(parameters) + "\n", encoding="utf-8")
        temporary.rename(root)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # after a success it is not there any more


def _check_existing(root: Path, parameters: dict[str, int]) -> None:
    """Raise UserError unless `root` is the complete set of these parameters."""
    record = root / _RECORD
    if not record.is_file():
        raise UserError(
            f"{root}: expected a new or empty folder or an earlier demo set, but it holds something else "
            f"(no {_RECORD}); give another folder"
        )
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{record}: not readable as JSON; delete the folder {root} to write the set anew") from error
    if found != parameters:
        raise UserError(
            f"{root}: holds a demo set of {found}, but {parameters} was asked for; "
            "delete the folder to write it anew, or give another folder"
        )
    for split in _SPLITS:
        expected = parameters[split] // len(CLASSES)
        for name in CLASSES:
            count = len(list((root / split / name).glob("*.jpg")))
            if count != expected:
                raise UserError(
                    f"{root / split / name}: {count} images, {expected} were written; "
                    f"delete the folder {root} to write the set anew"
                )


def _mask(pattern: Pattern, height: int, width: int, rng: np.random.Generator) -> Array:
    """(height, width) share of each pixel that the pattern covers, at a random scale, stretch, rotation and offset."""
    period = np.float32(rng.uniform(*_PERIOD) * min(height, width))
    stretch = np.float32(_STRETCH ** rng.uniform(-1, 1))
    angle, offset = rng.uniform(0, 2 * np.pi), rng.uniform(0, _OFFSET, 2).astype(np.float32)
    x = (np.arange(width, dtype=np.float32) - width / 2) / (period * stretch)
    y = (np.arange(height, dtype=np.float32) - height / 2)[:, None] / (period / stretch)
    u, v = _rotate(x, y, np.float32(np.cos(angle)), np.float32(np.sin(angle)))
    return (0.5 - period * pattern(u + offset[0], v + offset[1], rng)).clip(0, 1)


def _colours(luminance: Array, rng: np.random.Generator) -> Array:
    """Colours (n, n, 3) of random hue and saturation with the given luminance (n, n), by mixing in black or white."""
    hue = 6 * rng.random((*luminance.shape, 1))
    saturation = rng.uniform(0.2, 1, (*luminance.shape, 1))
    sector = (np.array((5, 3, 1)) + hue) % 6
    pure = 1 - saturation * np.minimum(sector, 4 - sector).clip(0, 1)
    own, wanted = (pure @ _LUMA)[..., None], luminance[..., None]
    darker = pure * (wanted / own)
    lighter = pure + (1 - pure) * (wanted - own) / np.maximum(1 - own, 1e-6)
    return np.where(own > wanted, darker, lighter).astype(np.float32)


def _enlarge(grid: Array, height: int, width: int) -> Array:
    """Bilinear interpolation of (n, n, 3) to (height, width, 3), corners on corners."""

    def weights(size: int) -> Array:
        nodes = len(grid)
        place = np.linspace(0, nodes - 1, size)[:, None]
        return (1 - np.abs(place - np.arange(nodes))).clip(0, 1).astype(np.float32)

    rows = np.tensordot(weights(height), grid, 1)
    return np.matmul(weights(width), rows)


# Patterns: the signed distance in periods from the border of the pattern, negative inside, at (x, y) in periods.


def _stripes(x: Array, y: Array, rng: np.random.Generator) -> Array:
    return _bands(x, 0.5)


def _zigzag(x: Array, y: Array, rng: np.random.Generator) -> Array:
    return 0.65 * _bands(y + 0.8 * np.abs(np.mod(0.7 * x, 2) - 1), 0.5)


def _checkerboard(x: Array, y: Array, rng: np.random.Generator) -> Array:
    columns, rows = _bands(0.7 * x, 0.5), _bands(0.7 * y, 0.5)
    return -1.4 * np.sign(columns * rows) * np.minimum(np.abs(columns), np.abs(rows))


def _grid(x: Array, y: Array, rng: np.random.Generator) -> Array:
    return 1.25 * np.minimum(_bands(0.8 * x, 0.3), _bands(0.8 * y, 0.3))


def _dots(x: Array, y: Array, rng: np.random.Generator) -> Array:
    u, v = _scatter(x, y, 1.0, rng)
    return np.hypot(u, v) - 0.31


def _rings(x: Array, y: Array, rng: np.random.Generator) -> Array:
    u, v = _scatter(x, y, 1.25, rng)
    return np.abs(np.hypot(u, v) - 0.42) - 0.11


def _triangles(x: Array, y: Array, rng: np.random.Generator) -> Array:
    u, v = _scatter(x, y, 1.25, rng)
    return np.maximum(np.maximum(-u, 0.5 * u + 0.866 * v), 0.5 * u - 0.866 * v) - 0.28


def _targets(x: Array, y: Array, rng: np.random.Generator) -> Array:
    u, v = _scatter(x, y, 2.6, rng)
    radius = np.hypot(u, v)
    return np.maximum(0.81 * _bands(radius / 0.81, 0.5), radius - 1.24)


def _pinwheels(x: Array, y: Array, rng: np.random.Generator) -> Array:
    u, v = _scatter(x, y, 2.2, rng)
    radius = np.hypot(u, v)
    arm = 2 * np.pi / 5
    return np.maximum(radius * arm * _bands(np.arctan2(v, u) / arm, 0.5), radius - 1.05)


def _blobs(x: Array, y: Array, rng: np.random.Generator) -> Array:
    """Where smooth noise is negative: a random value at each corner of a grid, eased between them."""
    n = 32
    values = rng.standard_normal((n, n), np.float32)
    column, row = np.floor(1.2 * x), np.floor(1.2 * y)
    u, v = 1.2 * x - column, 1.2 * y - row
    u, v = u * u * (3 - 2 * u), v * v * (3 - 2 * v)
    i, j = column.astype(np.intp), row.astype(np.intp)
    left = values[i % n, j % n] * (1 - v) + values[i % n, (j + 1) % n] * v
    right = values[(i + 1) % n, j % n] * (1 - v) + values[(i + 1) % n, (j + 1) % n] * v
    return 0.5 * (left * (1 - u) + right * u)


def _bands(t: Array, share: float) -> Array:
    """Signed distance from bands of period 1 that cover `share` of the line."""
    return np.abs(np.mod(t, 1) - 0.5) - share / 2


def _rotate(x: Array, y: Array, cos: Array | np.float32, sin: Array | np.float32) -> tuple[Array, Array]:
    return cos * x + sin * y, cos * y - sin * x


def _scatter(x: Array, y: Array, spacing: float, rng: np.random.Generator) -> tuple[Array, Array]:
    """(x, y) relative to the nearest centre: a hexagonal lattice, each centre shifted and turned at random."""
    n = 32
    y = y / (spacing * 0.866)
    row = np.floor(y)
    x = x / spacing + 0.5 * np.mod(row, 2)
    column = np.floor(x)
    centre = (np.mod(row, n) * n + np.mod(column, n)).astype(np.intp)
    shift = rng.uniform(-0.1, 0.1, (2, n * n)).astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi, n * n).astype(np.float32)
    u = x - column - 0.5 + shift[0][centre]
    v = 0.866 * (y - row - 0.5) + shift[1][centre]
    u, v = _rotate(u, v, np.cos(angle)[centre], np.sin(angle)[centre])
    return spacing * u, spacing * v


_PATTERNS: dict[str, Pattern] = {
    "stripes": _stripes,
    "zigzag": _zigzag,
    "checkerboard": _checkerboard,
    "grid": _grid,
    "dots": _dots,
    "rings": _rings,
    "triangles": _triangles,
    "targets": _targets,
    "pinwheels": _pinwheels,
    "blobs": _blobs,
}
CLASSES: tuple[str, ...] = tuple(_PATTERNS)
