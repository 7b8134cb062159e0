"""Comparing runs: two are the same when every tensor of their state and every metric is, bit for bit."""

import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from synco_fast.engine import checkpoints
from synco_fast.files import read_json_lines
from tests.conftest import SYNCO_FAST, environment


def pretrain_command(config: Path, data: Path, output: Path, *options: str, settings: Sequence[str] = ()) -> list[str]:
    """A run that goes on with what there is; each setting is a KEY=VALUE."""
    command = [*SYNCO_FAST, "pretrain", str(config), "--data", str(data), "--set", f"output={output}"]
    command += [word for setting in settings for word in ("--set", setting)]
    return [*command, "--resume", "auto", *options]


def run_until(command: list[str], step: int, number: int) -> tuple[int, str]:
    """Start a run, send it a signal once it has reported a step, and return its exit code and output."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment())
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if line.startswith(f"step {step}/"):
            process.send_signal(number)
            break
    seen += process.stderr.readlines()
    return process.wait(), "".join(seen)


def kill_after(command: list[str], step: int) -> None:
    code, output = run_until(command, step, signal.SIGKILL)
    assert code == -signal.SIGKILL, output


def final_state(output: Path) -> dict[str, Any]:
    """A run's latest checkpoint, without what names the run's place."""
    state = checkpoints.load(checkpoints.folder(output) / checkpoints.LATEST)
    del state["config"]["output"]
    return state


def rows(output: Path) -> list[dict[str, Any]]:
    """A run's metrics without timings."""
    found = read_json_lines(output / "metrics.jsonl")
    for row in found:
        row.pop("timing", None)
    return found


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Paths at which two nested states differ; tensors must be equal bit for bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))
        return [] if same else [path]
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [f"{path} has keys {a.keys() ^ b.keys()} on one side"]
        return [found for key in a for found in differences(a[key], b[key], f"{path}.{key}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        pairs = enumerate(zip(a, b, strict=True))
        return [found for i, (x, y) in pairs for found in differences(x, y, f"{path}.{i}")]
    return [] if a == b else [f"{path}: {a!r} != {b!r}"]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
