"""Image files into memory: encoded bytes, and the size and format their header states."""

import io
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from PIL import Image

from synco_fast.data.samples import Sample, open_image, read_bytes
from synco_fast.errors import UserError

# What PIL calls the formats that the decoder handles; MPO is a JPEG with further pictures behind it.
_FORMATS = ("JPEG", "MPO", "PNG", "BMP", "WEBP", "TIFF", "PPM")
_NOT_AN_IMAGE = (OSError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Header:
    """Height and width in pixels as stored, without EXIF rotation, and the format's name."""

    height: int
    width: int
    format: str


def read_image(sample: Sample) -> tuple[np.ndarray, Header]:
    """A file's bytes, (n,) uint8, still encoded, and its header.

    Raises:
        UserError: unreadable, empty, or not an image of a supported format; names the file.
    """
    try:
        data = read_bytes(sample)
    except OSError as error:
        raise _unreadable(sample, error) from error
    return np.frombuffer(data, np.uint8), _parse_header(sample, io.BytesIO(data))


def read_header(sample: Sample) -> Header:
    """A file's header alone, reading no more than it needs.

    Raises:
        UserError: as `read_image`.
    """
    try:
        with open_image(sample) as file:
            return _parse_header(sample, file)
    except OSError as error:
        raise _unreadable(sample, error) from error


def decoding_fault(sample: Sample) -> str | None:
    """Why an image's pixels cannot be decoded, or None if they can."""
    try:
        with open_image(sample) as file, Image.open(file) as image:
            image.load()
    except _NOT_AN_IMAGE as error:
        return str(error)
    return None


def _parse_header(sample: Sample, file: BinaryIO) -> Header:
    try:
        with Image.open(file) as image:
            header = Header(image.height, image.width, image.format or "unknown")
    except _NOT_AN_IMAGE as error:
        raise UserError(
            f"image file {sample} is empty or not a readable image; replace or remove it ({error})"
        ) from error
    if header.format not in _FORMATS:
        raise UserError(f"image file {sample} is a {header.format}; supported are {', '.join(_FORMATS)}")
    return header


def _unreadable(sample: Sample, error: OSError) -> UserError:
    return UserError(f"image file {sample} cannot be read: {error.strerror}")
