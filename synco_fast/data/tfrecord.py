"""Images in a TFRecord file of tf.train.Example messages, without TensorFlow.

A record is its length (8 bytes, little-endian), a checksum of these 8 bytes, the message, and a checksum of the
message; a message is protocol buffer wire format. https://www.tensorflow.org/tutorials/load_data/tfrecord
"""

import os
import struct
from collections.abc import Iterator
from pathlib import Path

from synco_fast.data.tar import Record, check_uncompressed
from synco_fast.errors import UserError

IMAGE = "image/encoded"
LABEL = "image/class/label"
_HEADER = struct.Struct("<QI")
_FOOTER_BYTES = 4
_PIECE = 4096
_CASTAGNOLI = 0x82F63B78
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5

Span = tuple[int, int]


def scan_tfrecord(path: Path) -> list[Record]:
    """The images of a file's records (feature `image/encoded`, label `image/class/label` if present), in order.

    The checksums of the lengths are verified; messages are read except for the images, so theirs are not.

    Raises:
        UserError: not a whole TFRecord file, or records of another kind; names the file and the record.
    """
    records: list[Record] = []
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            raise UserError(f"shard {path} is empty; expected TFRecord")
        position = 0
        while position < size:
            where = f"shard {path}: record {len(records)} at byte {position}"
            length = _message_length(path, where, file.fileno(), position)
            start = position + _HEADER.size
            position = start + length + _FOOTER_BYTES
            if position > size:
                raise UserError(f"{where} ends at byte {position}, beyond the file's {size}; the file is cut short")
            try:
                (first, last), label = _image_and_label(_Window(file.fileno(), start + length), (start, start + length))
            except ValueError as error:
                raise UserError(f"{where} is not a tf.train.Example with an image: {error}") from error
            records.append(Record(f"record-{len(records)}", first, last - first, label))
    return records


def _message_length(path: Path, where: str, descriptor: int, position: int) -> int:
    header = os.pread(descriptor, _HEADER.size, position)
    if len(header) < _HEADER.size:
        raise UserError(f"{where} is {len(header)} bytes long; the file is cut short")
    length, checksum = _HEADER.unpack(header)
    if checksum != _masked_crc32c(header[:8]):
        check_uncompressed(path, descriptor)
        raise UserError(f"{where} has a wrong checksum; the file is damaged or not TFRecord")
    return int(length)


def _crc_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (_CASTAGNOLI if value & 1 else 0)
        table.append(value)
    return table


_TABLE = _crc_table()


def _masked_crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


class _Window:
    """A file's bytes up to `end`, read in pieces where they are asked for."""

    def __init__(self, descriptor: int, end: int) -> None:
        self._descriptor = descriptor
        self._end = end
        self._start = 0
        self._piece = b""

    def read(self, span: Span) -> bytes:
        start, end = span
        if start < self._start or end > self._start + len(self._piece):
            self._start = start
            self._piece = os.pread(self._descriptor, min(max(end - start, _PIECE), self._end - start), start)
        return self._piece[start - self._start : end - self._start]

    def varint(self, position: int) -> tuple[int, int]:
        """The number at a position, and the position after it."""
        at = position - self._start
        if 0 <= at < len(self._piece) and self._piece[at] < 0x80:  # most are of one byte
            return self._piece[at], position + 1
        value = shift = 0
        for byte in self.read((position, min(position + 10, self._end))):
            value |= (byte & 0x7F) << shift
            position += 1
            shift += 7
            if byte < 0x80:
                return value & 0xFFFFFFFFFFFFFFFF, position
        raise ValueError("a number does not end")

    def fields(self, span: Span) -> Iterator[tuple[int, Span]]:
        """A message's fields: each one's number and where its value is."""
        position, end = span
        while position < end:
            tag, start = self.varint(position)
            kind = tag & 7
            if kind == _VARINT:
                _, position = self.varint(start)
            elif kind == _LENGTH:
                length, start = self.varint(start)
                position = start + length
            elif kind in (_FIXED64, _FIXED32):
                position = start + (8 if kind == _FIXED64 else 4)
            else:
                raise ValueError(f"wire type {kind}")
            if position > end:
                raise ValueError("a field is longer than its message")
            yield tag >> 3, (start, position)

    def field(self, span: Span, number: int) -> Span:
        """The last field of this number, as protocol buffers have it; an empty one where there is none."""
        found = (span[1], span[1])
        for other, value in self.fields(span):
            if other == number:
                found = value
        return found


def _image_and_label(window: _Window, example: Span) -> tuple[Span, int | None]:
    """Field numbers: Example.features 1, Features.feature 1 (a map: key 1, value 2), Feature.bytes_list 1 and
    .int64_list 3, and .value 1 of both.
    """
    features: dict[bytes, Span] = {}
    for number, entry in window.fields(window.field(example, 1)):
        if number == 1:
            key = window.field(entry, 1)
            features[window.read(key)] = window.field(entry, 2)
    if IMAGE.encode() not in features:
        names = ", ".join(sorted(name.decode(errors="replace") for name in features)) or "none"
        raise ValueError(f"it has no feature {IMAGE}; its features: {names[:200]}")
    images = [value for number, value in window.fields(window.field(features[IMAGE.encode()], 1)) if number == 1]
    if len(images) != 1:
        raise ValueError(f"its feature {IMAGE} holds {len(images)} byte strings, not one")
    label = features.get(LABEL.encode())
    return images[0], None if label is None else _label(window, window.field(label, 3))


def _label(window: _Window, numbers: Span) -> int:
    values = [value for number, value in window.fields(numbers) if number == 1]
    if len(values) != 1 or values[0][0] == values[0][1]:
        raise ValueError(f"its feature {LABEL} is not one int64")
    value, after = window.varint(values[0][0])  # packed or not, one number looks the same
    if after != values[0][1]:
        raise ValueError(f"its feature {LABEL} is not one int64")
    return value - 2**64 if value >= 2**63 else value
