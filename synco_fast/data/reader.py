"""Image files into memory: bytes that DALI decodes to what PIL gives, and the size and format of the image.

"What PIL gives" is `Image.open(file).convert("RGB")`. DALI gives the same bits for JPEGs of 8 bits with one or three
components, PNGs of up to 8 bits per channel, and WebP, so those go to it as they are. For the rest it sometimes
differs (CMYK without Adobe's marker, 16 bits, orientation and palettes of TIFFs, BMPs of 16 bits) or fails (GIF, TIFFs
of one bit), so the rest is decoded by PIL here and goes on as PPM. The device plays no part in this.
"""

import io
import re
import struct
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from PIL import Image

from synco_fast.data.samples import Sample, open_image, read_bytes
from synco_fast.errors import UserError

_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")  # as PIL calls them; it tries no others
_MOST_PIXELS = 178_956_970  # PIL refuses more, and a header alone must not make anyone allocate gigabytes
_LONGEST_SIDE = 65_535  # a JPEG has no longer; PIL takes minutes over longer rows, and DALI refuses them
_HEAD_BYTES = 1 << 16
_JPEG_START, _JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
_JPEG_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive
_JPEG_TABLES = (0xC4, 0xCC)  # among the markers of frames
_PNG_START = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"


class BadFile(UserError):
    """A file that no view can be made of; `reason` follows its name in a sentence."""

    def __init__(self, sample: Sample, reason: str) -> None:
        super().__init__(f"image file {sample} {reason}; replace or remove it")
        self.reason = reason


@dataclass(frozen=True)
class Header:
    """Height and width in pixels as stored, without EXIF rotation, and the format's name."""

    height: int
    width: int
    format: str


def read_image(sample: Sample) -> tuple[np.ndarray, Header]:
    """A file's image, (n,) uint8, encoded so that DALI gives PIL's pixels, and its header.

    Raises:
        BadFile: unreadable, empty, cut short, too large, or not an image of a supported format.
    """
    try:
        data = read_bytes(sample)
    except OSError as error:
        raise _unreadable(sample, error) from error
    found = _straight(data)
    if found is None:
        return _converted(sample, data)
    header, start = found
    _check_size(sample, header)
    # A decoder may make up what is missing. Good files have the end's mark too, though not always at the very end.
    if header.format == "JPEG" and data.rfind(_JPEG_END, start) < 0:
        raise BadFile(sample, "is truncated")
    return np.frombuffer(data, np.uint8), header


def read_header(sample: Sample) -> Header:
    """A file's header alone, reading no more than it needs.

    Raises:
        BadFile: unreadable, empty, too large, or not an image of a supported format.
    """
    try:
        with open_image(sample) as file:
            return _parse_header(sample, file)
    except OSError as error:
        raise _unreadable(sample, error) from error


def decoding_fault(data: np.ndarray) -> str | None:
    """What PIL says against the pixels of an encoded image, or None if it decodes them."""
    try:
        _decode(data.tobytes())
    except MemoryError:
        raise
    except Exception as error:
        return _in_short(error)
    return None


def _parse_header(sample: Sample, file: BinaryIO) -> Header:
    found = _straight(file.read(_HEAD_BYTES))
    if found is not None:
        header = found[0]
    else:
        file.seek(0)
        try:
            with Image.open(file, formats=_FORMATS) as image:
                header = Header(image.height, image.width, image.format or "unknown")
        except Exception as error:
            raise BadFile(sample, _not_opened(error, empty=not file.seek(0, io.SEEK_END))) from error
    _check_size(sample, header)
    return header


def _straight(data: bytes) -> tuple[Header, int] | None:
    """Header of an image that DALI decodes as PIL does, and where to look for its pixels; None for others and WebP."""
    try:
        if data.startswith(_JPEG_START):
            return _jpeg(data)
        if data.startswith(_PNG_START):
            width, height, depth = struct.unpack_from(">IIB", data, len(_PNG_START))
            return (Header(height, width, "PNG"), 0) if depth <= 8 else None
    except (IndexError, struct.error):  # the data end within the header
        pass
    return None


def _jpeg(data: bytes) -> tuple[Header, int] | None:
    """Walk the markers (ITU T.81, annex B) to the frame's header; this takes a twentieth of PIL's time."""
    at = 2
    while data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # filling
            at += 1
        elif marker in _JPEG_FRAMES:
            depth, height, width, components = struct.unpack_from(">BHHB", data, at + 4)
            plain = depth == 8 and components in (1, 3) and height > 0 and width > 0
            return (Header(height, width, "JPEG"), at) if plain else None
        elif marker in _JPEG_TABLES or marker > 0xDA:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        else:
            return None
    return None


def _converted(sample: Sample, data: bytes) -> tuple[np.ndarray, Header]:
    """The image as PIL decodes it, as PPM; WebP as it is."""
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except Exception as error:
        raise BadFile(sample, _not_opened(error, empty=not data)) from error
    with image:
        form = image.format or "unknown"
        if form == "WEBP":
            return np.frombuffer(data, np.uint8), Header(image.height, image.width, form)
        _check_size(sample, Header(image.height, image.width, form))
        try:
            pixels = image.convert("RGB")
        except MemoryError:
            raise
        except Exception as error:  # whatever the damage happens to run into
            raise BadFile(sample, _in_short(error)) from error
    encoded = b"P6 %d %d 255\n" % pixels.size + pixels.tobytes()
    return np.frombuffer(encoded, np.uint8), Header(pixels.height, pixels.width, form)


def _decode(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        return image.convert("RGB")


def _check_size(sample: Sample, header: Header) -> None:
    if header.height * header.width > _MOST_PIXELS or max(header.height, header.width) > _LONGEST_SIDE:
        raise BadFile(sample, _TOO_LARGE)
    if header.height * header.width == 0:
        raise BadFile(sample, "has no pixels")


_TOO_LARGE = f"has more than {_MOST_PIXELS} pixels, or {_LONGEST_SIDE} on a side"
_NO_IMAGE = "is not a readable image (JPEG, PNG, GIF, BMP, WebP, TIFF or PPM)"


def _not_opened(error: Exception, empty: bool) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return _TOO_LARGE
    return "is empty" if empty else _NO_IMAGE


def _in_short(error: Exception) -> str:
    """PIL's text without what differs from file to file."""
    text = re.sub(r" \(.*\)| when reading image file", "", str(error))
    return "is truncated" if "truncated" in text else f"cannot be decoded: {text or type(error).__name__}"


def _unreadable(sample: Sample, error: OSError) -> BadFile:
    return BadFile(sample, f"cannot be read: {error.strerror}")
