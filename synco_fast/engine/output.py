"""The output folder of a run, which belongs to the run that was started last."""

import os
import socket
import uuid
from collections.abc import Callable
from pathlib import Path

from synco_fast.engine import checkpoints
from synco_fast.engine.distributed import Processes
from synco_fast.engine.stopping import agreed
from synco_fast.errors import UserError
from synco_fast.files import write_text_atomically

OWNER = "owner"
"""Names the process that writes to a folder, or did so last."""


class Claim:
    """A run's claim to its folder. Another run that goes on from its checkpoints takes it, and this one has to end:
    it may be one that torchrun left behind, or on a machine that was taken for dead and wakes.

    Args:
        output: the folder. processes: of the run, whose main one writes.
        option: what messages call the folder.
    """

    def __init__(self, output: Path, processes: Processes, option: str) -> None:
        self._path, self._processes, self._option = output / OWNER, processes, option
        self._mine = f"process {os.getpid()} on {socket.gethostname()}, start {uuid.uuid4().hex}"

    def make(self) -> None:
        """Claim the folder, from whoever has it.

        Raises:
            UserError: it cannot be written to.
        """
        write_text_atomically(self._path, self._mine + "\n")

    def taken(self) -> bool:
        """Whether another run has it."""
        return self._owner() != self._mine

    def check(self) -> None:
        """On the process that writes.

        Raises:
            UserError: another run has it.
        """
        if self.taken():
            raise self._lost()

    def check_all(self) -> None:
        """`check`, by all processes, of which one writes."""
        if agreed(self._processes, True, self._processes.is_main and self.taken())[0]:
            raise self._lost()

    def _lost(self) -> UserError:
        return UserError(f"{self._option}: another run writes there now ({self._owner()}), so this one has to end")

    def _owner(self) -> str:
        try:
            return self._path.read_text(encoding="utf-8", errors="replace").strip()
        except OSError:  # no word of another
            return self._mine


def claimed(output: Path, processes: Processes, option: str, begin: Callable[[], object]) -> Claim:
    """The folder, with one for checkpoints in it, and a claim to it; all processes call it.

    Args:
        option: what messages call the folder. begin: called on the main process once it is there.

    Raises:
        UserError: on all processes: it cannot be made or written to, or `begin` failed.
    """
    claim, error = Claim(output, processes, option), None
    try:
        if processes.is_main:
            _make(output, option)
            claim.make()
            begin()
    except UserError as found:
        error = found
    if agreed(processes, True, error is not None)[0]:
        raise error or UserError(f"{option}: cannot be used; rank 0 says why")
    return claim


def _make(output: Path, option: str) -> None:
    try:
        checkpoints.folder(output).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option}: cannot make the folder: {error.strerror}") from error
    if not os.access(output, os.W_OK):
        raise UserError(f"{option}: the folder cannot be written to")
