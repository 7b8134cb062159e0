"""Writing files so that a reader never finds half of one."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from synco_fast.errors import UserError


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call write(file) on a temporary file beside `path`, flush it to disk, then put it in `path`'s place.

    The temporary name is fixed, so a run that was killed leaves at most one, and the next write takes it over.

    Raises:
        UserError: the file cannot be written; what was there before is untouched.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
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


def sync_folder(folder: Path) -> None:
    """Make renames and links within a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
