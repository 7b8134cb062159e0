"""The output folder of a run, which is one run's at a time."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from synco_fast.engine import checkpoints
from synco_fast.engine.distributed import Processes
from synco_fast.engine.stopping import agreed
from synco_fast.errors import UserError
from synco_fast.files import held

LOCK = "run.lock"


@contextlib.contextmanager
def owned(output: Path, processes: Processes, option: str, begin: Callable[[], object]) -> Iterator[None]:
    """The folder, with one for checkpoints in it, and this run's alone until its end.

    Args:
        option: what messages call the folder. begin: called on the main process once it is there.

    Raises:
        UserError: on all processes: it cannot be made or written to, another run is at work there, or `begin` failed.
    """
    error = None
    with contextlib.ExitStack() as stack:
        try:
            if processes.is_main:
                _make(output, option)
                stack.enter_context(held(output / LOCK, f"{option}: another run"))
                begin()
        except UserError as found:
            error = found
        if agreed(processes, True, error is not None)[0]:
            raise error or UserError(f"{option}: cannot be used; rank 0 says why")
        yield


def _make(output: Path, option: str) -> None:
    try:
        checkpoints.folder(output).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option}: cannot make the folder: {error.strerror}") from error
    if not os.access(output, os.W_OK):
        raise UserError(f"{option}: the folder cannot be written to")
