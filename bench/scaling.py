"""Whole steps over several processes on one machine's CPUs, and what they send: python -m bench.scaling.

See bench/README.md. Every setting is a start of its own under torchrun, in a network namespace of its own where that is
allowed, whose loopback device counts what goes over it.
"""

import argparse
import contextlib
import ctypes
import fcntl
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.about import about_run, default_output
from bench.measure import quantiles
from bench.rows import append
from bench.traffic import sent
from synco_fast.config import Config, parse
from synco_fast.engine import distributed, speed
from synco_fast.engine.run import build_contrast
from synco_fast.engine.step import TrainStep
from synco_fast.errors import UserError

Row = dict[str, Any]
MODES = ("split", "plain", "shuffle", "sync")
_WARM_UP = 3
_NEWNET, _SIOCGIFFLAGS, _SIOCSIFFLAGS, _UP = 0x40000000, 0x8913, 0x8914, 1


def config_of(options: argparse.Namespace, mode: str, processes: int) -> Config:
    """As many images on each process, however many there are."""
    batch = options.samples * processes
    return parse(
        {
            "method": "synco",
            "data": {"batch_size": batch, "image_size": options.size, "eval_resize": options.size},
            "model": {"arch": options.arch, "stem": options.stem},
            "bn": {"mode": mode, "group_size": options.samples // 2},
            "queue": {"size": 16 * batch},
            "negatives": {"n_hard": min(1024, 16 * batch)},
            "trainer": {"precision": options.precision, "device": "cpu"},
        },
        "bench.scaling",
    )


def worker(settings: dict[str, Any], steps: int, output: Path) -> None:
    """In each process under torchrun: take steps, time them, and count what crosses the loopback device."""
    torch.set_num_threads(1)
    config = parse(settings, "bench.scaling")
    processes = distributed.start(torch.device("cpu"))
    how = speed.resolve(config, processes)
    step = TrainStep(config, processes, speed.apply(how, build_contrast(config, processes)), how)
    shape = (config.data.batch_size // processes.world_size, 3, config.data.image_size, config.data.image_size)
    views = [torch.randn(shape).contiguous(memory_format=torch.channels_last) for _ in range(2)]
    hard, times = config.negatives.hard(), []
    for number in range(_WARM_UP + steps):
        if number == _WARM_UP:
            processes.barrier()
            before = loopback_bytes()
        start = time.perf_counter()
        step(views, hard, number, 0.01)
        times.append(time.perf_counter() - start)
    processes.barrier()
    if processes.is_main:
        wire = (loopback_bytes() - before) / steps / processes.world_size
        output.write_text(json.dumps({"times": times[_WARM_UP:], "wire": wire}))
    processes.barrier()
    distributed.stop()


def loopback_bytes() -> int:
    """What the loopback device of this network namespace has carried."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    (fields,) = [line.split(":")[1].split() for line in lines if line.strip().startswith("lo:")]
    return int(fields[0])


def isolate() -> None:
    """Put this process into a network namespace of its own, whose loopback device is up. Only root may."""
    if ctypes.CDLL(None, use_errno=True).unshare(_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = fcntl.ioctl(control, _SIOCGIFFLAGS, struct.pack("16sH14x", b"lo", 0))
        flags = struct.unpack("16sH14x", request)[1]
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", flags | _UP))


def can_isolate() -> bool:
    """Whether this user may have network namespaces."""
    done = subprocess.run(
        [sys.executable, "-c", "from bench.scaling import isolate; isolate()"], capture_output=True, check=False
    )
    return done.returncode == 0


def measured(options: argparse.Namespace, mode: str, processes: int, alone: bool) -> Row:
    """A row of one setting."""
    config = config_of(options, mode, processes)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "found.json"
        words = ["--worker", config.model_dump_json(), "--steps", str(options.steps), "--output", str(output)]
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        done = subprocess.run(
            [sys.executable, *launcher, "-m", "bench.scaling", *words],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            preexec_fn=isolate if alone else None,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode:
            raise UserError(f"{mode} on {processes} processes failed: {done.stderr.strip()[-800:]}")
        found = json.loads(output.read_text())
    median, p20, p80, n = quantiles([1e3 * seconds for seconds in found["times"]])
    counted = {name: round(value) for name, value in sent(config, processes).items()}
    return {
        "bn_mode": mode,
        "processes": processes,
        "samples": options.samples,
        "arch": options.arch,
        "stem": options.stem,
        "size": options.size,
        "precision": options.precision,
        "median_ms": round(median, 3),
        "p20_ms": round(p20, 3),
        "p80_ms": round(p80, 3),
        "n": n,
        "images_per_second": round(1e3 * config.data.batch_size / median, 2),
        "sent_bytes": counted,
        "wire_bytes": round(found["wire"]) if alone else None,
    }


def table(rows: Sequence[Row]) -> str:
    """As text: times, and bytes that a process sends in a step, counted and as they were on the wire."""
    times = " ".join(f"{name:>8}" for name in ("ms", "p20", "p80"))
    lines = [f"{'mode':<8} {'W':>2} {times} {'images/s':>9} {'counted':>12} {'wire':>12} ratio"]
    for row in rows:
        counted, wire = sum(row["sent_bytes"].values()), row["wire_bytes"]
        lines.append(
            f"{row['bn_mode']:<8} {row['processes']:>2} {row['median_ms']:>8.1f} {row['p20_ms']:>8.1f} "
            f"{row['p80_ms']:>8.1f} {row['images_per_second']:>9.1f} {counted:>12,} "
            + ("" if wire is None else f"{wire:>12,} {wire / counted if counted else float('nan'):>6.3f}")
        )
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__)
    found.add_argument("--processes", default="1,2,4", help="numbers of processes")
    found.add_argument("--modes", default=",".join(MODES), help="of batch norm")
    found.add_argument("--samples", type=int, default=32, help="images of each process")
    found.add_argument("--arch", default="resnet18")
    found.add_argument("--stem", default="imagenet")
    found.add_argument("--size", type=int, default=64, help="side of an image in pixels")
    found.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    found.add_argument("--steps", type=int, default=20, help="that are timed")
    found.add_argument("--output", type=Path, help="file of rows; left out: bench/results/scaling-DEVICE-DATE.jsonl")
    found.add_argument("--worker", help=argparse.SUPPRESS)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    if options.worker is not None:
        worker(json.loads(options.worker), options.steps, options.output)
        return
    about = about_run("cpu", ()) | {"threads": 1}
    alone, rows = can_isolate(), []
    for processes in map(int, options.processes.split(",")):
        for mode in options.modes.split(","):
            if mode in ("shuffle", "sync") and processes == 1:
                continue
            try:
                rows.append({**measured(options, mode, processes, alone), **about})
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
                sys.exit(1)
            print(table(rows[-1:]).splitlines()[1], file=sys.stderr, flush=True)
    append(options.output or default_output("scaling", about), rows)
    print(table(rows))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
