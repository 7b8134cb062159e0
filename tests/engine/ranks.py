"""Several processes under torchrun: a function on each with what it returned, or a command with what it said."""

import contextlib
import importlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from synco_fast.engine import distributed
from tests.conftest import REPOSITORY, SYNCO_FAST, environment

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def on_ranks(function: Callable[..., Any], count: int, folder: Path, *arguments: object) -> list[Any]:
    """What function(processes, *arguments as text) returns on each of `count` ranks: tensors and plain values."""
    done = start_ranks(function, count, folder, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(count)]


def start_ranks(
    function: Callable[..., Any], count: int, folder: Path, *arguments: object
) -> subprocess.CompletedProcess[str]:
    """The same, whatever comes of it."""
    folder.mkdir(exist_ok=True)
    worker = ["-m", "tests.engine.ranks", function.__module__, function.__name__, str(folder), *map(str, arguments)]
    command = [*TORCHRUN, f"--nproc-per-node={count}", *worker]
    return subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, check=False)


class Launched:
    """torchrun with a command of synco-fast, its messages read as they come."""

    def __init__(self, words: list[str], processes: int, restarts: int = 0) -> None:
        options = [f"--nproc-per-node={processes}", f"--max-restarts={restarts}", "--monitor-interval=0.1"]
        command = [*TORCHRUN, *options, "-m", "synco_fast", *words[len(SYNCO_FAST) :]]
        self.process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, env=environment())
        self.said: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)

    def workers(self) -> list[int]:
        """Its processes, in order of rank."""
        command = ["pgrep", "--parent", str(self.process.pid), "-f", "synco_fast"]
        listed = subprocess.run(command, capture_output=True, text=True, check=False)
        found = [(_rank(process), process) for process in map(int, listed.stdout.split())]
        return [process for rank, process in sorted(found) if rank >= 0]

    def wait_for(self, text: str, start: int = 0) -> None:
        """Until it says so, after so many lines."""
        while not any(text in line for line in self.said[start:]):
            assert self._reader.is_alive(), "".join(self.said)
            time.sleep(0.02)

    def end(self) -> tuple[int, str]:
        """Its exit code, and all that it said."""
        code = self.process.wait()
        self._reader.join()
        return code, "".join(self.said)


def _rank(process: int) -> int:
    """-1: it has gone."""
    with contextlib.suppress(OSError):
        for variable in Path(f"/proc/{process}/environ").read_bytes().split(b"\0"):
            if variable.startswith(b"RANK="):
                return int(variable[5:])
    return -1


def main(module: str, name: str, folder: str, *arguments: str) -> None:
    processes = distributed.start(torch.device("cpu"))
    found = getattr(importlib.import_module(module), name)(processes, *arguments)
    torch.save(found, f"{folder}/rank-{processes.rank}.pt")
    processes.barrier()
    distributed.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
