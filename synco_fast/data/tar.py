"""Images in a WebDataset shard: a tar file whose members belong together when their names agree up to the first dot."""

import os
import re
import tarfile
from pathlib import Path
from typing import NamedTuple

from synco_fast.data.samples import IMAGE_SUFFIXES
from synco_fast.errors import UserError

_LABEL = "cls"
_NUMBER = re.compile(rb"\s*(-?[0-9]{1,18})\s*")
_BLOCK = 512
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class Record(NamedTuple):
    """One image of a shard: its name there, where its bytes are, and its class number if it has one."""

    name: str
    offset: int
    length: int
    label: int | None


class _Group:
    """The members of one sample."""

    def __init__(self) -> None:
        self.images: dict[str, tarfile.TarInfo] = {}
        self.label: tarfile.TarInfo | None = None


def scan_tar(path: Path) -> list[Record]:
    """The images of a shard, in the order of their bytes. Headers and labels are read, images are not.

    A sample's image is the member with an image's extension; its label the integer in the member `.cls`, if any.
    Hidden members and those of other kinds are left out.

    Raises:
        UserError: not a whole tar file, or one that cannot be read so; names the shard and the member.
    """
    groups: dict[str, _Group] = {}
    with path.open("rb") as file:
        for member in _members(path, file.fileno()):
            name = _normal_name(path, member)
            key, extension = _split(name)
            suffix = os.path.splitext(name)[1].lower()
            if not key or (extension != _LABEL and suffix not in IMAGE_SUFFIXES):
                continue
            if not member.isreg() or member.issparse():
                raise UserError(f"shard {path}: {name} is a link or a sparse file; pack the files themselves (tar -h)")
            group = groups.setdefault(key, _Group())
            if name in group.images or (extension == _LABEL and group.label is not None):
                raise UserError(f"shard {path}: {name} is there more than once, so it is unclear which counts")
            if extension == _LABEL:
                group.label = member
            else:
                group.images[name] = member
        records = [_record(path, file.fileno(), group) for group in groups.values() if group.images]
    if not records:
        raise UserError(f"shard {path} holds no images; their names end in {' '.join(IMAGE_SUFFIXES)}")
    return sorted(records, key=lambda record: record.offset)


def check_uncompressed(path: Path, descriptor: int) -> None:
    """Refuse a file that begins like a compressed one: its images cannot be read one by one."""
    start = os.pread(descriptor, 8, 0)
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            raise UserError(f"shard {path} is compressed ({name}); shards must be uncompressed: decompress it")


def _members(path: Path, descriptor: int) -> list[tarfile.TarInfo]:
    try:
        with tarfile.open(path, "r:") as archive:
            members = archive.getmembers()
    except (tarfile.TarError, EOFError, ValueError) as error:
        check_uncompressed(path, descriptor)
        raise UserError(f"shard {path} is damaged, cut short or not a tar file: {error}") from error
    # tarfile stops at what is no header as if it were the end, which a block of zeros marks.
    if os.pread(descriptor, _BLOCK, archive.offset) != bytes(_BLOCK):
        raise UserError(
            f"shard {path} is damaged or cut short at byte {archive.offset}, after {len(members)} members: "
            "no header and no mark of the end; make it again"
        )
    return members


def _normal_name(path: Path, member: tarfile.TarInfo) -> str:
    name = os.path.normpath(member.name)
    if name.startswith(("/", "../")):
        raise UserError(f"shard {path}: {member.name} leads out of the folder it would be unpacked to")
    return name


def _split(name: str) -> tuple[str, str]:
    """A member's name to (key, extension): parted at the first dot of the file's name. No key for a hidden file."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return (folder + slash + stem if stem else ""), extension.lower()


def _record(path: Path, descriptor: int, group: _Group) -> Record:
    images = group.images
    if len(images) > 1:  # a.jpg beside a.mask.png: the image is what is nothing but an image
        images = {name: member for name, member in images.items() if "." + _split(name)[1] in IMAGE_SUFFIXES}
    if len(images) != 1:
        names = sorted(group.images)
        raise UserError(
            f"shard {path}: {names[0]} and {names[1]} are one sample, as names up to the first dot are the same, "
            "so it is unclear which is its image; rename them, or pack the folder with synco-fast data pack"
        )
    [(name, member)] = images.items()
    return Record(name, member.offset_data, member.size, _label(path, descriptor, group.label))


def _label(path: Path, descriptor: int, member: tarfile.TarInfo | None) -> int | None:
    if member is None:
        return None
    content = os.pread(descriptor, min(member.size, 64), member.offset_data)
    number = _NUMBER.fullmatch(content)
    if number is None:
        raise UserError(f"shard {path}: {member.name} holds {content[:20]!r}; expected a class number (0, 1, 2, ...)")
    return int(number[1])
