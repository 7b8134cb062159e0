"""Writing files so that a reader never finds half of one, and reading what was appended to until a crash."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, BinaryIO

from synco_fast.errors import UserError


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call write(file) on a temporary file beside `path`, flush it to disk, then put it in `path`'s place.

    The temporary name is fixed, so a run that was killed leaves at most one, and the next write takes it over.

    Raises:
        UserError: the file cannot be written; what was there before is untouched.
    """

    def make(temporary: Path) -> None:
        with temporary.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())

    _put(path, make)


def symlink(target: str, path: Path) -> None:
    """Have `path` be a symbolic link to a name in its own folder, in place of what it was; a copy where there are none.

    Raises:
        UserError: it cannot be made; what was there before is untouched.
    """
    _put(path, lambda temporary: _link_or_copy(temporary, path.parent / target, lambda: temporary.symlink_to(target)))


def link(source: Path, path: Path) -> None:
    """Have `path` be the file `source` under another name, or a copy where the file system has no hard links.

    Raises:
        UserError: it cannot be made; what was there before is untouched.
    """
    _put(path, lambda temporary: _link_or_copy(temporary, source, lambda: temporary.hardlink_to(source)))


def _link_or_copy(path: Path, source: Path, make: Callable[[], object]) -> None:
    try:
        make()
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV):
            raise
        with source.open("rb") as original, path.open("xb") as copy:
            shutil.copyfileobj(original, copy)
            copy.flush()
            os.fsync(copy.fileno())


def _put(path: Path, make: Callable[[Path], object]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        make(temporary)
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"{path}: cannot write it: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):  # after a success it is not there any more
            temporary.unlink()


def write_text_atomically(path: Path, text: str) -> None:
    """`write_atomically` for text."""
    write_atomically(path, lambda file: file.write(text.encode()))


def check_folder(folder: Path, known: Collection[str], what: str) -> None:
    """Refuse a folder for results that holds anything but the known files (or folders), or cannot be written to.

    Args:
        folder: may not be there yet. known: names that what is to be written may replace. what: leaves them there.

    Raises:
        UserError: naming what is in the way; nothing has been written.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder}: expected a folder, and it is a file; name another")
    mine = {*known, *(f".{name}.tmp" for name in known)}
    others = sorted(path.name for path in folder.iterdir() if path.name not in mine) if folder.exists() else []
    if others:
        raise UserError(f"--output {folder}: holds {others[0]}, which no {what} left there; name another folder")
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--output {folder}: {existing} cannot be written to; name another folder")


def make_folder(folder: Path) -> None:
    """Make a folder for results, and those above it.

    Raises:
        UserError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder}: cannot make the folder: {error.strerror}") from error


def sync_folder(folder: Path) -> None:
    """Make renames and links within a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.EOPNOTSUPP):  # of file systems that do not know it
            raise
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Rows (objects) of a file of JSON lines; what is none, as a last line cut short by a crash, is left out."""
    rows = []
    for line in path.read_bytes().split(b"\n"):
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]
