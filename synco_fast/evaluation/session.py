"""What the evaluations share: weights and data opened, the processes joined, and a result file at the end."""

import contextlib
import json
import shlex
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from synco_fast import __version__
from synco_fast.config import Data, prepare
from synco_fast.data.index import Index, scan
from synco_fast.engine.distributed import Processes, choose_device
from synco_fast.engine.probe import held_out_like
from synco_fast.engine.run import processes_on
from synco_fast.engine.weights import Weights, load_weights
from synco_fast.files import check_folder, make_folder, write_text_atomically
from synco_fast.machine import device_name

RESULT = "result.json"


@dataclass(frozen=True)
class Request:
    """What every evaluation is told.

    Attributes:
        checkpoint: whose weights. root: of the data, with classes and a held-out split. output: folder for the results.
        overrides: `data.KEY=VALUE`, over how the checkpoint's images were prepared.
        device: auto, cpu or cuda. precision: fp32, or bf16: the backbone runs under autocast.
    """

    checkpoint: Path
    root: Path
    output: Path
    overrides: Sequence[str] = ()
    device: str = "auto"
    precision: str = "fp32"


@dataclass(frozen=True, eq=False)
class Session:
    """An evaluation under way.

    Attributes:
        command: its name. request: what it was told. weights: on the CPU.
        data: how images are prepared. bank, held_out: the labelled images of `train/` and of `val/` or `test/`.
        processes: this one among them.
    """

    command: str
    request: Request
    weights: Weights
    data: Data
    bank: Index
    held_out: Index
    processes: Processes
    started: float

    @property
    def bf16(self) -> bool:
        return self.request.precision == "bf16"

    def say(self, text: str) -> None:
        """A line of what was found, on standard output, by the main process."""
        if self.processes.is_main:
            print(text)

    def write(self, metrics: dict[str, float], settings: dict[str, Any], **details: Any) -> dict[str, Any]:
        """Write `result.json`, by the main process, and return what it holds.

        Args:
            metrics: the numbers that tables show, by name. settings: of this command.
            details: more, by name.
        """
        result = {
            "command": self.command,
            "metrics": metrics,
            "settings": settings,
            "weights": self.weights.about,
            "data": {
                "root": str(self.request.root),
                "image_size": self.data.image_size,
                "eval_resize": self.data.eval_resize,
                **{name: of_index(index) for name, index in (("train", self.bank), ("held_out", self.held_out))},
            },
            **details,
            "about": about(self.processes, self.request.precision, self.started),
        }
        if self.processes.is_main:
            write_result(self.request.output, result)
        return result


@contextlib.contextmanager
def opened(
    command: str, request: Request, files: Collection[str] = (), unread: Collection[str] = ("root", "recipe")
) -> Iterator[Session]:
    """An evaluation from its checks to its end.

    Args:
        command: its name. files: what it leaves in the output folder beside `result.json`.
        unread: keys of data that mean nothing to it.

    Raises:
        UserError: the checkpoint, the data or the output folder cannot be used; nothing has been written.
    """
    check_folder(request.output, {RESULT, *files}, command)
    weights = load_weights(request.checkpoint)
    data = prepare(weights.data, request.overrides, unread)
    bank = scan(request.root)
    held_out = held_out_like(bank, request.root, command)
    advice = f"use more processes or --precision bf16, or lower --batch-size or data.batch_size = {data.batch_size}"
    with processes_on(choose_device(request.device, "--device"), advice) as processes:
        yield Session(command, request, weights, data, bank, held_out, processes, time.time())


def write_result(output: Path, result: dict[str, Any]) -> None:
    """Write `result.json` into a folder, which is made."""
    make_folder(output)
    write_text_atomically(output / RESULT, json.dumps(result, indent=1, allow_nan=False))


def of_index(index: Index) -> dict[str, Any]:
    """Which images a result is of."""
    return {"folder": str(index.root), "images": len(index), "classes": len(index.classes), "digest": index.digest}


def about(processes: Processes, precision: str, started: float) -> dict[str, Any]:
    """With what a result was made, when, and how to make it again."""
    cuda = processes.device.type == "cuda"
    return {
        "command": shlex.join(["synco-fast", *sys.argv[1:]]),
        "synco_fast": __version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "device": device_name(processes.device),
        "threads": torch.get_num_threads(),
        "processes": processes.world_size,
        "precision": precision,
        "started": time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(started)),
        "seconds": round(time.time() - started, 3),
    }
