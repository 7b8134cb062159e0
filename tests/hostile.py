"""Data sets with hostile files among good ones: every kind of damage and oddity, and which of them are bad."""

import io
import struct
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from tests.data.conftest import photograph

CLASSES = ("ant", "bee")


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def headed(jpeg: bytes, height: int, width: int) -> bytes:
    """A JPEG's tables with another size in its header, and no data."""
    frame = jpeg.index(b"\xff\xc0")
    return jpeg[: frame + 5] + struct.pack(">HH", height, width) + jpeg[frame + 9 : jpeg.index(b"\xff\xda")]


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("notes.txt", "no image")
    return buffer.getvalue()


def hostile_kinds(rng: np.random.Generator) -> dict[str, tuple[bytes, bool]]:
    """Content of one file of each kind, all to be named .JPEG, and whether it is bad."""
    image = photograph(rng, 60, 80)
    jpeg = encoded(image, "JPEG")
    kinds = {f"cut at {tenth}0%": (jpeg[: len(jpeg) * tenth // 10], True) for tenth in range(1, 10)}
    return kinds | {
        "without its end": (jpeg[:-2], True),
        "empty": (b"", True),
        "garbage": (rng.bytes(2000), True),
        "garbage behind a JPEG's start": (b"\xff\xd8\xff\xe0" + rng.bytes(2000), True),
        "text": (b"no image\n" * 20, True),
        "zip": (zipped(), True),
        "20,000 x 20,000 and no data": (headed(jpeg, 20_000, 20_000), True),
        "PNG of no width": (encoded(image, "PNG")[:16] + bytes(4) + encoded(image, "PNG")[20:], True),
        "PPM of one row, too long": (b"P6 70000 1 255\n" + bytes(210_000), True),
        "PNG cut": (encoded(image, "PNG")[:-40], True),
        "one pixel": (encoded(image.resize((1, 1)), "JPEG"), False),
        "CMYK": (encoded(image.convert("CMYK"), "JPEG"), False),
        "grey": (encoded(image.convert("L"), "JPEG"), False),
        "16-bit PNG": (encoded(Image.fromarray(rng.integers(0, 65536, (40, 50)).astype(np.uint16)), "PNG"), False),
        "animated GIF": (encoded(image, "GIF", save_all=True, append_images=[photograph(rng, 60, 80)]), False),
        "PNG named JPEG": (encoded(image, "PNG"), False),
        "trailing bytes": (jpeg + rng.bytes(500), False),
    }


def write_hostile(root: Path, good: int, hostile: int, seed: int = 0) -> set[str]:
    """Write train/<class>/*.JPEG: so many good JPEGs, and so many hostile files, kind after kind, between them.

    Returns:
        Names of the bad ones, relative to root/train.
    """
    rng = np.random.default_rng(seed)
    for name in CLASSES:
        (root / "train" / name).mkdir(parents=True)
    contents = [(encoded(photograph(rng, *rng.integers(40, 70, 2).tolist()), "JPEG"), False) for _ in range(good)]
    while hostile > 0:
        kinds = list(hostile_kinds(rng).values())[:hostile]
        contents += kinds
        hostile -= len(kinds)
    bad = set()
    for number, i in enumerate(rng.permutation(len(contents)).tolist()):
        content, is_bad = contents[i]
        name = f"{CLASSES[number % 2]}/{number:05}.JPEG"
        (root / "train" / name).write_bytes(content)
        if is_bad:
            bad.add(name)
    return bad
