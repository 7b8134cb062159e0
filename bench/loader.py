"""Images a second that arrive as two augmented views, ours beside torchvision and plain DALI: python -m bench.loader.

See bench/README.md. One contender runs at a time; rounds run each once, in an order drawn anew.
"""

import argparse
import dataclasses
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.about import about_run, default_output
from bench.loader_contenders import CONTENDERS, Setting
from bench.measure import quantiles
from bench.rows import append
from synco_fast.config import DTYPES
from synco_fast.data.index import Index, scan
from synco_fast.data.operator import resolve
from synco_fast.data.order import steps_per_epoch
from synco_fast.data.pack import pack
from synco_fast.data.recipes import RECIPES
from synco_fast.errors import UserError

Row = dict[str, Any]
Case = tuple[str, Setting, bool]  # contender, setting, cold page cache
_WARM_UP = 2
_SHARD_BYTES = 500_000_000
_PACKAGES = ("torchvision", "pillow", "nvidia-dali-cuda120", "nvidia-dali-cuda130")


def cases(base: Setting, only: Sequence[str], vary: bool, packed: Index | None) -> list[Case]:
    """Every contender at the base setting; with `vary`, our loader with one thing changed, and on `packed` images."""
    listed: list[Case] = [(name, base, False) for name in only]
    if vary:
        changes: list[dict[str, Any]] = [{"prefetch": n} for n in (1, 2, 4) if n != base.prefetch]
        changes += [{"threads": n} for n in (1, 2, 4, 8, 16) if n != base.threads and n <= 2 * (os.cpu_count() or 1)]
        changes += [{"dtype": torch.float16}, {"batch": 2 * base.batch}]
        listed += [("synco_fast", dataclasses.replace(base, **change), False) for change in changes]
        listed.append(("synco_fast", base, True))
        if packed is not None:
            shards = dataclasses.replace(base, index=packed)
            listed += [("synco_fast", shards, False), ("synco_fast", shards, True)]
    return listed


def images_per_second(case: Case, batches: int) -> float:
    """Of so many batches, after the first ones."""
    name, setting, cold = case
    if cold:
        drop_page_cache(setting.index)
    stream = CONTENDERS[name].batches(setting)
    try:
        for _ in range(0 if cold else _WARM_UP):
            next(stream)
        _synchronize(setting.device)
        start = time.perf_counter()
        for _ in range(batches):
            next(stream)
        _synchronize(setting.device)
        return batches * setting.batch / (time.perf_counter() - start)
    finally:
        stream.close()  # type: ignore[attr-defined]


def drop_page_cache(index: Index) -> None:
    """Have the kernel forget the files, so that they are read from the disk, as far as it obliges."""
    for path in {index.path(i) for i in range(len(index))}:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure(listed: list[Case], rounds: int, batches: int) -> list[list[float]]:
    """Images a second of each case in each round."""
    rates: list[list[float]] = [[] for _ in listed]
    order, shuffle = list(range(len(listed))), random.Random(0).shuffle
    for done in range(rounds):
        shuffle(order)
        for i in order:
            rates[i].append(images_per_second(listed[i], batches))
        print(f"round {done + 1} of {rounds}", file=sys.stderr)
    return rates


def row(case: Case, rates: Sequence[float]) -> Row:
    name, setting, cold = case
    median, p20, p80, n = quantiles(rates)
    return {
        "contender": name,
        "images_per_second": round(median, 2),
        "p20": round(p20, 2),
        "p80": round(p80, 2),
        "n": n,
        "batch": setting.batch,
        "size": setting.size,
        "threads": setting.threads,
        "prefetch": setting.prefetch,
        "dtype": str(setting.dtype).removeprefix("torch."),
        "page_cache": "cold" if cold else "warm",
        "format": "shards" if setting.index.shards else "files",
    }


def data_wait(config: Path, data: Path, steps: int) -> Row:
    """The share of training steps spent waiting for data, as `synco-fast pretrain` itself logs it."""
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"output={folder}/run", f"trainer.max_steps={steps}", f"trainer.log_every={steps // 2}"]
        settings.append("knn.every_epochs=0")
        command = [sys.executable, "-m", "synco_fast", "pretrain", str(config), "--data", str(data)]
        command += [part for setting in settings for part in ("--set", setting)]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise UserError(f"--step {config}: pretraining with it failed: {done.stderr.strip()[-500:]}")
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    logged = [line for line in map(json.loads, lines) if line["kind"] == "train"]
    timing = logged[-1]["timing"]  # the first holds what starts up
    kept = {name: timing[name] for name in ("images_per_second", "data_wait")}
    return {"contender": "pretrain", "config": config.name, "steps": steps, **kept}


def table(rows: Sequence[Row]) -> str:
    """The rows of one run as text, beside our loader at the base setting."""
    base = next((row["images_per_second"] for row in rows if row["contender"] == "synco_fast"), float("nan"))
    lines = [f"{'contender':<24} {'images/s':>9} {'p20':>8} {'p80':>8} {'n':>3} {'/ ours':>7}  setting"]
    for one in rows:
        if one["contender"] == "pretrain":
            lines.append(f"pretrain {one['config']}: {one['data_wait']:.2%} of the time waiting for data")
            continue
        names = ("batch", "size", "threads", "prefetch", "dtype", "page_cache", "format")
        setting = ", ".join(f"{name} {one[name]}" for name in names)
        lines.append(
            f"{one['contender']:<24} {one['images_per_second']:>9.1f} {one['p20']:>8.1f} {one['p80']:>8.1f} "
            f"{one['n']:>3} {one['images_per_second'] / base:>7.2f}  {setting}"
        )
    return "\n".join(lines)


def run(options: argparse.Namespace) -> list[Row]:
    unknown = set(options.only) - set(CONTENDERS)
    if unknown:
        raise UserError(f"--only {', '.join(sorted(unknown))}: expected some of {', '.join(CONTENDERS)}")
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no CUDA device")
    index = scan(options.data)
    steps_per_epoch(len(index), options.batch)  # or the error that says what is too small
    absent = [name for name in options.only if CONTENDERS[name].needs_gpu and device.type == "cpu"]
    if absent:
        print(f"left out without a GPU: {', '.join(absent)}", file=sys.stderr)
    filed = [name for name in options.only if CONTENDERS[name].needs_files]
    if index.shards and filed:
        raise UserError(
            f"--only {','.join(filed)}: reads images in files of their own, and {options.data} holds shards"
        )
    if options.steps < 2:
        raise UserError(f"--steps {options.steps}: expected 2 or more, of which the first half is not counted")
    base = Setting(
        index=index,
        recipe=RECIPES["moco_v2"],
        batch=options.batch,
        size=options.size,
        threads=options.threads,
        prefetch=options.prefetch,
        dtype=DTYPES[options.dtype],
        device=device,
    )
    about = about_run(options.device, _PACKAGES) | {"augmentation": resolve("auto", device), "threads": options.threads}
    with tempfile.TemporaryDirectory() as folder:
        packed = None
        if options.vary and not base.index.shards:
            pack(options.data, Path(folder) / "packed", _SHARD_BYTES)
            packed = scan(Path(folder) / "packed")
        listed = cases(base, [name for name in options.only if name not in absent], options.vary, packed)
        rates = measure(listed, options.rounds, options.batches)
    output = options.output or default_output("loader", about)
    rows = [row(case, rates) for case, rates in zip(listed, rates, strict=True)]
    append(output, [about | row for row in rows])
    if options.step is not None:
        rows.append(data_wait(options.step, options.data, options.steps))
        append(output, [about | rows[-1]])
    return rows


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the loader against what it replaces.")
    parser.add_argument("--data", type=Path, required=True, help="images, as data.root")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, default=64, help="images per batch")
    parser.add_argument("--size", type=int, default=224, help="side of a view in pixels")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads, or workers")
    parser.add_argument("--prefetch", type=int, default=2, help="batches made ahead")
    parser.add_argument("--dtype", choices=("fp32", "fp16"), default="fp32", help="of the views")
    parser.add_argument("--rounds", type=int, default=7, help="times each contender runs")
    parser.add_argument("--batches", type=int, default=12, help="batches that are timed in a round")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(CONTENDERS), help="contenders")
    parser.add_argument("--vary", action="store_true", help="our loader also with one setting changed at a time")
    parser.add_argument("--step", type=Path, metavar="CONFIG", help="also the data wait of pretraining with it")
    parser.add_argument("--steps", type=int, default=20, help="of that pretraining")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: by device and date in bench/results")
    try:
        print(table(run(parser.parse_args())))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
