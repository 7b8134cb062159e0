"""A short CIFAR-10 run with the settings of the MoCo authors' demo, labelled rows as they come: python -m bench.cifar.

It is `synco-fast pretrain configs/cifar10_r18.yaml` with another number of epochs and another method. See README.md.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.about import about_run, default_output
from bench.rows import append
from synco_fast.config import PRESETS, load
from synco_fast.errors import UserError
from synco_fast.ops import KINDS

CONFIG = Path(__file__).parent.parent / "configs" / "cifar10_r18.yaml"
_PACKAGES = ("torchvision", "nvidia-dali-cuda120", "nvidia-dali-cuda130")
# 5 steps of 20 images on a CPU, in seconds.
_QUICK = (
    "data.batch_size=20",
    "data.image_size=16",
    "data.eval_resize=16",
    "queue.size=100",
    "bn.group_size=10",
    "negatives.n_hard=16",
    "trainer.precision=fp32",
    "trainer.log_every=1",
)


def overrides(options: argparse.Namespace, output: Path) -> list[str]:
    """What is changed in the configuration, beside its images."""
    config = load(CONFIG)
    # The configuration has 10 of 200 epochs without synthetic negatives: in proportion, but one at least, and not all.
    warmup = max(1, config.negatives.warmup_epochs * options.epochs // config.trainer.epochs)
    changes = [
        f"output={output}",
        f"method={options.method}",
        f"trainer.epochs={options.epochs}",
        f"trainer.device={options.device}",
        f"knn.every_epochs={options.epochs}",  # at the end only
        f"data.threads={os.cpu_count() or 1}",
        f"negatives.warmup_epochs={min(warmup, options.epochs - 1)}",
    ]
    if options.method != "synco":
        # Fewer than the published ones by as much as the configuration has fewer of SynCo's.
        preset, share = PRESETS[options.method], PRESETS["synco"].n_hard // config.negatives.n_hard
        changes += [f"negatives.{field}={getattr(preset, field) // share}" for field in ("n_hard", *KINDS)]
    if options.device == "cuda":
        changes += ["loss.backend=cuda", "data.augmentation=compiled"]  # these or an error
    return changes + list(_QUICK if options.quick else ())


def new_rows(path: Path, seen: int) -> Iterator[dict[str, Any]]:
    """The rows of a run's metrics after the first `seen`, but for one that is not wholly written."""
    if path.is_file():
        *lines, _ = path.read_text(encoding="utf-8").split("\n")
        yield from map(json.loads, lines[seen:])


def run(options: argparse.Namespace) -> int:
    """Train, and add the run's rows to the output while it goes on; the exit code of the training."""
    about = about_run(options.device, _PACKAGES)
    output = options.output or default_output("cifar", about)
    with tempfile.TemporaryDirectory() as folder:
        changes = overrides(options, Path(folder) / "run")
        about |= {"contender": "pretrain", "config": CONFIG.name, "method": options.method, "epochs": options.epochs}
        about["batch"] = 20 if options.quick else load(CONFIG).data.batch_size
        command = [sys.executable, "-m", "synco_fast", "pretrain", str(CONFIG), "--data", str(options.data)]
        command += [part for change in changes for part in ("--set", change)]
        seen = 0
        with subprocess.Popen(command) as process:
            # The training finishes its step, and what it has written is still to be read.
            signal.signal(signal.SIGTERM, lambda *_: process.terminate())
            running = True
            while running:
                time.sleep(0.5)
                running = process.poll() is None
                found = list(new_rows(Path(folder) / "run" / "metrics.jsonl", seen))
                append(output, [about | row for row in found])
                seen += len(found)
        return process.returncode


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.cifar", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 as JPEG files, as data.root")
    parser.add_argument("--method", choices=tuple(PRESETS), default="synco")
    parser.add_argument("--epochs", type=int, default=10, help="of the whole schedule; the demo has 200")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that all of it runs, and no more")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: by device and date in bench/results")
    try:
        sys.exit(run(parser.parse_args()))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
