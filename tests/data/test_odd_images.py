"""Images of every kind come out of the real pipeline with the pixels that PIL gives; damaged ones are refused."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from synco_fast.data.corrupt import Checker
from synco_fast.data.index import Index, scan
from synco_fast.data.numbers import evaluation_numbers
from synco_fast.data.pipeline import evaluation_pipeline
from synco_fast.data.reader import read_header, read_image
from synco_fast.data.recipes import IMAGENET_MEAN, IMAGENET_STD
from synco_fast.data.samples import Sample
from synco_fast.errors import UserError
from tests.data.conftest import ORIENTATION, photograph
from tests.hostile import encoded, headed

HEIGHT, WIDTH = 40, 56
RNG = np.random.default_rng(3)
PHOTO = photograph(RNG, HEIGHT, WIDTH)
OTHER = photograph(RNG, HEIGHT, WIDTH)
JPEG = encoded(PHOTO, "JPEG")


def with_alpha(mode: str) -> Image.Image:
    image = PHOTO.convert(mode)
    image.putalpha(Image.fromarray(RNG.integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)))
    return image


def rotated(form: str) -> bytes:
    exif = PHOTO.getexif()
    exif[ORIENTATION] = 6
    return encoded(PHOTO, form, exif=exif)


def with_thumbnail() -> bytes:
    return encoded(PHOTO, "JPEG", exif=b"Exif\0\0" + encoded(PHOTO.resize((16, 12)), "JPEG"))


def sixteen_bits() -> Image.Image:
    return Image.fromarray(RNG.integers(0, 65536, (HEIGHT, WIDTH)).astype(np.uint16))


def adobe(jpeg: bytes, transform: int | None) -> bytes:
    """A CMYK JPEG of PIL's with another colour transform in Adobe's marker (2: YCCK), or without the marker."""
    at = jpeg.index(b"\xff\xee")
    return jpeg[:at] + (b"" if transform is None else jpeg[at : at + 15] + bytes([transform])) + jpeg[at + 16 :]


def png(depth: int, colour: int, channels: int) -> bytes:
    """A PNG of random samples, of a kind that PIL does not write."""
    rows = RNG.integers(0, 256, (HEIGHT, WIDTH * channels * depth // 8), dtype=np.uint8)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bmp_of_16_bits() -> bytes:
    pixels = RNG.integers(0, 256, HEIGHT * WIDTH * 2, dtype=np.uint8).tobytes()
    masks = struct.pack("<III", 0xF800, 0x7E0, 0x1F)
    header = struct.pack("<IiiHHIIiiII", 40, WIDTH, HEIGHT, 1, 16, 3, len(pixels), 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 66 + len(pixels), 0, 0, 66) + header + masks + pixels


CMYK = encoded(PHOTO.convert("CMYK"), "JPEG")
ODD: dict[str, bytes] = {
    "JPEG": JPEG,
    "JPEG, grey": encoded(PHOTO.convert("L"), "JPEG"),
    "JPEG, progressive": encoded(PHOTO, "JPEG", progressive=True),
    "JPEG, colours at full size": encoded(PHOTO, "JPEG", subsampling=0),
    "JPEG, stored as RGB": encoded(PHOTO, "JPEG", keep_rgb=True),
    "JPEG, rotated by EXIF": rotated("JPEG"),
    "JPEG with a thumbnail": with_thumbnail(),
    "JPEG with trailing bytes": JPEG + RNG.bytes(1000),
    "JPEG with filling": JPEG[:2] + b"\xff\xff" + JPEG[2:],
    "JPEG with a long profile": encoded(PHOTO, "JPEG", icc_profile=RNG.bytes(150_000)),
    "JPEG, CMYK": CMYK,
    "JPEG, YCCK": adobe(CMYK, 2),
    "JPEG, CMYK without Adobe's marker": adobe(CMYK, None),
    "MPO": encoded(PHOTO, "MPO", save_all=True, append_images=[OTHER]),
    "PNG": encoded(PHOTO, "PNG"),
    "PNG, grey": encoded(PHOTO.convert("L"), "PNG"),
    "PNG, 1 bit": encoded(PHOTO.convert("1"), "PNG"),
    "PNG, palette": encoded(PHOTO.quantize(16), "PNG"),
    "PNG, palette with a transparent colour": encoded(PHOTO.quantize(16), "PNG", transparency=3),
    "PNG, palette with transparency": encoded(PHOTO.quantize(16), "PNG", transparency=bytes(range(0, 160, 10))),
    "PNG with alpha": encoded(with_alpha("RGB"), "PNG"),
    "PNG, grey with alpha": encoded(with_alpha("L"), "PNG"),
    "PNG, grey, 16 bits": encoded(sixteen_bits(), "PNG"),
    "PNG, 16 bits": png(16, 2, 3),
    "PNG, 16 bits with alpha": png(16, 6, 4),
    "PNG, grey, 16 bits with alpha": png(16, 4, 2),
    "PNG, grey, 4 bits": png(4, 0, 1),
    "PNG, rotated by EXIF": rotated("PNG"),
    "PNG, animated": encoded(PHOTO, "PNG", save_all=True, append_images=[OTHER]),
    "GIF": encoded(PHOTO, "GIF"),
    "GIF with a transparent colour": encoded(PHOTO.quantize(16), "GIF", transparency=3),
    "GIF, animated": encoded(PHOTO, "GIF", save_all=True, append_images=[OTHER]),
    "WebP": encoded(PHOTO, "WEBP"),
    "WebP with alpha": encoded(with_alpha("RGB"), "WEBP", lossless=True),
    "WebP, animated": encoded(PHOTO, "WEBP", save_all=True, append_images=[OTHER]),
    "TIFF": encoded(PHOTO, "TIFF"),
    "TIFF, 1 bit": encoded(PHOTO.convert("1"), "TIFF"),
    "TIFF, palette": encoded(PHOTO.quantize(16), "TIFF"),
    "TIFF, grey with alpha": encoded(with_alpha("L"), "TIFF"),
    "TIFF, 16 bits": encoded(sixteen_bits(), "TIFF"),
    "TIFF of floats": encoded(PHOTO.convert("F"), "TIFF"),
    "TIFF, CMYK": encoded(PHOTO.convert("CMYK"), "TIFF"),
    "TIFF, rotated": rotated("TIFF"),
    "BMP": encoded(PHOTO, "BMP"),
    "BMP, palette": encoded(PHOTO.quantize(16), "BMP"),
    "BMP, 16 bits": bmp_of_16_bits(),
    "PPM": encoded(PHOTO, "PPM"),
    "PGM, 16 bits": b"P5 %d %d 65535\n" % (WIDTH, HEIGHT) + RNG.bytes(HEIGHT * WIDTH * 2),
    "PPM of 100 values": b"P6 %d %d 100\n" % (WIDTH, HEIGHT) + RNG.integers(0, 101, HEIGHT * WIDTH * 3, "u1").tobytes(),
    "one pixel": encoded(PHOTO.resize((1, 1)), "JPEG"),
}


def index_of(folder: Path, content: bytes) -> Index:
    """An index of one file whose name says JPEG, whatever it is."""
    (folder / "a.JPEG").write_bytes(content)
    return scan(folder)


def middle(sample: Sample) -> np.ndarray:
    """The decoded image's middle square, from the pipeline without resizing, (side, side, 3) uint8."""
    data, header = read_image(sample)
    side = min(header.height, header.width)
    inputs = [[data], evaluation_numbers(torch.tensor([[header.height, header.width]]), side, side).numpy()]
    pipeline = evaluation_pipeline(
        lambda: inputs,
        batch_size=1,
        image_size=side,
        dtype=torch.float32,
        augmentation="compiled",
        device=torch.device("cpu"),
        threads=1,
        prefetch=1,
    )
    [output] = pipeline.run()
    pixels = 255 * (np.array(output.as_tensor())[0].astype(float) * IMAGENET_STD + IMAGENET_MEAN)
    assert np.abs(pixels - pixels.round()).max() < 1e-3
    return pixels.round().astype(np.uint8)


@pytest.mark.parametrize("kind", ODD)
def test_pixels_are_those_of_pil(kind: str, tmp_path: Path) -> None:
    index = index_of(tmp_path, ODD[kind])
    expected = np.asarray(Image.open(io.BytesIO(ODD[kind])).convert("RGB"))
    side = min(expected.shape[:2])
    top, left = ((length - side) // 2 for length in expected.shape[:2])
    assert np.array_equal(middle(index.sample(0)), expected[top : top + side, left : left + side])
    _, header = read_image(index.sample(0))
    assert (header.height, header.width) == expected.shape[:2]
    assert Checker(index, torch.device("cpu")).check(0).fault is None


def test_headers_name_the_format(tmp_path: Path) -> None:
    for kind, content in ODD.items():
        name = kind.split()[0].strip(",").upper()
        expected = {"MPO": "JPEG", "PGM": "PPM", "ONE": "JPEG"}.get(name, name)
        assert read_header(index_of(tmp_path, content).sample(0)).format == expected, kind


@pytest.mark.parametrize("kind", [kind for kind in ODD if kind not in ("JPEG with trailing bytes", "MPO", "one pixel")])
def test_what_is_cut_short_is_bad(kind: str, tmp_path: Path) -> None:
    """At every tenth; animations have whole first frames beyond the middle."""
    content = ODD[kind]
    for tenth in range(1, 5 if "animated" in kind else 10):
        index = index_of(tmp_path, content[: len(content) * tenth // 10])
        checked = Checker(index, torch.device("cpu")).check(0)
        assert checked.fault is not None, tenth


@pytest.mark.parametrize("missing", [1, 2, 3, 20, 300])
@pytest.mark.parametrize("kind", ["JPEG", "JPEG, grey", "JPEG, progressive", "JPEG with a thumbnail"])
def test_a_jpeg_without_its_end_is_bad_whatever_decodes_it(kind: str, missing: int, tmp_path: Path) -> None:
    """The reader alone finds it: a decoder on a GPU may make up what is missing."""
    path = index_of(tmp_path, ODD[kind][:-missing]).sample(0)
    with pytest.raises(UserError, match=rf"{path} is truncated"):
        read_image(path)


def broken_crc() -> bytes:
    content = bytearray(ODD["PNG"])
    content[content.index(b"IDAT") + 4 + struct.unpack_from(">I", content, content.index(b"IDAT") - 4)[0]] ^= 1
    return bytes(content)


BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "is empty"),
    "text": (lambda: b"no image", "is not a readable image"),
    "a format without support": (lambda: encoded(PHOTO, "JPEG2000"), "is not a readable image"),
    "start of a JPEG": (lambda: b"\xff\xd8\xff", "is not a readable image"),
    "JPEG with a hole in its header": (lambda: JPEG[:160] + bytes(300) + JPEG[460:], "is not a readable image"),
    "JPEG of 12 bits": (lambda: JPEG.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"), "is not a readable image"),
    "PNG with a wrong checksum": (broken_crc, "cannot be decoded"),
    "PNG without its end": (lambda: ODD["PNG"][:-12], "cannot be decoded"),
    "20,000 x 20,000 without data": (lambda: headed(JPEG, 20_000, 20_000), "has more than 178956970 pixels"),
    "20,000 x 20,000 with some": (
        lambda: headed(JPEG, 20_000, 20_000) + JPEG[JPEG.index(b"\xff\xda") :],
        "has more than 178956970 pixels",
    ),
    "CMYK of 20,000 x 20,000": (lambda: headed(CMYK, 20_000, 20_000), "has more than 178956970 pixels"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_and_their_reasons(kind: str, tmp_path: Path) -> None:
    make, reason = BAD[kind]
    checked = Checker(index_of(tmp_path, make()), torch.device("cpu")).check(0)
    assert checked.fault is not None and reason in checked.fault


def test_a_checker_survives_bad_files(tmp_path: Path) -> None:
    for number, content in enumerate([JPEG, broken_crc(), JPEG, b"", broken_crc(), ODD["PNG"]]):
        (tmp_path / f"{number}.jpg").write_bytes(content)
    checker = Checker(scan(tmp_path), torch.device("cpu"))
    assert [checker.check(i).fault is None for i in range(6)] == [True, False, True, False, False, True]
