"""What all rows of a run share, so that they can be read years later."""

import datetime
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.measure import device_name
from synco_fast import __version__
from synco_fast.machine import version

_REPOSITORY = Path(__file__).parent.parent


def about_run(device: str, packages: Sequence[str]) -> dict[str, Any]:
    """Device, threads, versions (of PyTorch and these packages), commit, date."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "synco_fast": __version__,
            **{package: version(package) for package in packages},
            "cuda": torch.version.cuda if device == "cuda" else None,
        },
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _commit() -> str | None:
    command = ["git", "-C", str(_REPOSITORY), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def default_output(bench: str, about: dict[str, Any]) -> Path:
    """bench/results/<bench>-<device>-<date>.jsonl, from the folder the command is run in."""
    device = re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
    return Path("bench/results") / f"{bench}-{device}-{about['date'][:10]}.jsonl"
