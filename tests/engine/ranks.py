"""A function on several processes under torchrun, and what it returned on each."""

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from synco_fast.engine import distributed
from tests.conftest import REPOSITORY, environment

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


def main(module: str, name: str, folder: str, *arguments: str) -> None:
    processes = distributed.start(torch.device("cpu"))
    found = getattr(importlib.import_module(module), name)(processes, *arguments)
    torch.save(found, f"{folder}/rank-{processes.rank}.pt")
    processes.barrier()
    distributed.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
