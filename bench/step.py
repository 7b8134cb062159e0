"""Whole training steps, ours beside what people write, in one run on one device: python -m bench.step.

See bench/README.md.
"""

import argparse
import gc
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import kernels, rows, step_rows
from bench.about import about_run, default_output
from bench.measure import Yardstick, interleaved
from bench.rows import Row
from bench.step_contenders import (
    CHANGES,
    CONTENDERS,
    Batches,
    Built,
    Contender,
    Step,
    ablated_keys,
    model_flops,
    ours,
    ours_from_files,
    ours_with,
    random_batches,
)
from synco_fast.config import PRESETS, Config, parse
from synco_fast.data.index import scan
from synco_fast.data.order import steps_per_epoch
from synco_fast.engine import speed as speeds
from synco_fast.errors import UserError
from synco_fast.ops import HardNegatives

_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
_SETTLING, _WATCHED = 3, 2
_RECOMPILE_LIMIT = 64
_COMPILED = ("moco_compiled",)
_QUICK_HARD: dict[str, HardNegatives] = {
    "moco": PRESETS["moco"],
    "mochi": kernels.QUICK.mochi,
    "synco": kernels.QUICK.hard,
}

_DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"arch": "resnet18", "stem": "cifar", "size": 32, "batches": [128], "precision": "fp32", "rounds": 10},
    "cuda": {"arch": "resnet50", "stem": "imagenet", "size": 224, "batches": [256], "precision": "bf16", "rounds": 20},
    "quick": {"arch": "resnet10_narrow", "stem": "imagenet", "size": 32, "batches": [8], "rounds": 2, "queue": 512},
}
_COMMON = {"queue": 65536, "dim": 128, "group": 32, "warm_up": 1}


def config_of(options: argparse.Namespace, method: str, batch: int) -> Config:
    """The configuration of a method at the sizes asked for, all else at its defaults.

    Raises:
        UserError: they cannot go together.
    """
    hard = (_QUICK_HARD if options.quick else PRESETS)[method]
    negatives = {kind: hard.count(kind) for kind in hard.kinds}
    if hard.total:
        negatives["n_hard"] = options.n_hard or hard.n_hard
    return parse(
        {
            "method": method,
            "data": {
                "batch_size": batch,
                "image_size": options.size,
                "eval_resize": options.size,
                "threads": os.cpu_count() or 1,
            },
            "model": {"arch": options.arch, "stem": options.stem, "dim": options.dim},
            "bn": {"group_size": options.group},
            "queue": {"size": options.queue},
            "negatives": negatives,
            "trainer": {"precision": options.precision, "device": options.device},
        },
        "bench.step",
    )


def contenders(options: argparse.Namespace, config: Config) -> dict[str, Contender]:
    """Who takes part, by name. config: SynCo's."""
    found = {name: contender for name, contender in CONTENDERS.items() if name in options.only}
    if options.ablate:
        for key in ablated_keys(config, torch.device(options.device)):
            if not (options.quick and key == "speed.compile=true"):
                found[f"synco {key}"] = Contender("synco", ours_with(key))
        for what, change in CHANGES.items():
            found[f"synco {what}"] = Contender("synco", ours(change))
    if options.data is not None:
        index = scan(options.data)
        steps_per_epoch(len(index), config.data.batch_size)  # or the error that says what is too small
        found["synco_from_files"] = Contender("synco", ours_from_files(index))
    return found


class _Round:
    """So many steps of a contender; remembers the last loss."""

    def __init__(self, step: Step, steps: int) -> None:
        self._step, self._steps = step, steps
        self.loss = torch.zeros(())

    def __call__(self) -> None:
        for _ in range(self._steps):
            self.loss = self._step()


class _Ready(NamedTuple):
    """A contender that has taken its first steps."""

    built: Built
    round: _Round
    peak_bytes: int | None


def _prepared(contender: Contender, config: Config, batches: Batches, options: argparse.Namespace) -> _Ready:
    """Build a contender and have it take its first steps: compilation, state of the optimizer, capture of a graph.

    Its peak memory is what the allocator held at most in the last of them, less what was there before it was built.
    (By then cuDNN has tried its algorithms, and a CUDA graph is captured in these.)
    """
    before = torch.cuda.memory_allocated() if options.device == "cuda" else 0
    built = contender.build(config, torch.device(options.device), batches)
    peak = None
    with built.within():
        if options.device == "cuda":
            _take(built.step, _SETTLING)
            torch.cuda.reset_peak_memory_stats()
            _take(built.step, _WATCHED)
            peak = torch.cuda.max_memory_allocated() - before
        else:
            built.step()
    return _Ready(built, _Round(built.step, options.steps), peak)


def _take(step: Step, steps: int) -> None:
    for _ in range(steps):
        step()
    torch.cuda.synchronize()


def measure(options: argparse.Namespace, batch: int, yardstick: Yardstick, about: Row) -> list[Row]:
    """The rows of every contender at one batch; those that fail become rows that say so."""
    torch.compiler.reset()
    # All contenders' encoders share code objects: one more than the limit would be left uncompiled without a word.
    torch._dynamo.config.recompile_limit = _RECOMPILE_LIMIT
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    configs = {method: config_of(options, method, batch) for method in PRESETS}
    flops = model_flops(configs["moco"])
    batches = random_batches(configs["moco"], torch.device(options.device))
    taking_part = contenders(options, configs["synco"])
    ready: dict[str, _Ready] = {}
    failed: dict[str, str] = {}
    for name, contender in taking_part.items():
        try:
            ready[name] = _prepared(contender, configs[contender.method], batches, options)
        except Exception as error:
            # What cannot work here, failures of the compiler, memory: all are results, and none ends the others' run.
            failed[name] = " ".join(str(error).split())[:300] or type(error).__name__
            gc.collect()
    steps: dict[str, Callable[[], Any]] = {name: one.round for name, one in ready.items()}
    times = interleaved(
        {**steps, **yardstick.steps},
        options.device,
        warm_up=options.warm_up,
        rounds=options.rounds,
        seconds=options.seconds,
        around={name: one.built.within for name, one in ready.items()},
    )
    per_step = {name: [time / options.steps for time in times[name]] for name in ready}
    bases = {name: per_step[name] for name in step_rows.BASES if name in per_step}
    found = []
    for name, contender in taking_part.items():
        built = ready[name].built if name in ready else Built(_nothing, configs[contender.method])
        description = step_rows.described(name, built.config, contender.batch_norm, built.speed)
        if name in ready and not bool(ready[name].round.loss.isfinite()):
            failed[name] = "its loss is not finite, and what follows such a loss is not a step of training"
        if name in failed:
            found.append(step_rows.skipped(description, failed[name], about))
            continue
        peak_flops = yardstick.peaks(times, _DTYPES[built.config.trainer.precision]).flops
        timed = step_rows.Timed(per_step[name], bases, options.steps, ready[name].peak_bytes, flops, peak_flops)
        found.append(step_rows.measured(description, timed, about))
    return found


def _nothing() -> Tensor:
    raise AssertionError("a contender that could not be built takes no steps")


def run(options: argparse.Namespace) -> list[Row]:
    """Measure at every batch, write the rows as they come, and return all of them."""
    for batch in options.batches:
        config_of(options, "synco", batch)  # or the error, before anything is measured
    speeds.choose_algorithms(torch.device(options.device), deterministic=False)
    precisions = _DTYPES.values() if options.ablate else [_DTYPES[options.precision]]
    yardstick = Yardstick(options.device, list(precisions), quick=options.quick)
    about = about_run(options.device, ["torchvision", "triton"])
    output = options.output or default_output("step", about)
    done: list[Row] = []
    for number, batch in enumerate(options.batches, start=1):
        print(f"{number} of {len(options.batches)}: batch {batch}", file=sys.stderr, flush=True)
        found = measure(options, batch, yardstick, about)
        rows.append(output, found)
        done += found
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()
    print(f"wrote {output}", file=sys.stderr)
    return done


def _names(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in CONTENDERS]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown contender {unknown[0]!r}: expected some of {', '.join(CONTENDERS)}")
    return names


def _numbers(text: str) -> list[int]:
    return list(dict.fromkeys(map(int, text.split(","))))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.step", description=__doc__)
    add = parser.add_argument
    add("--only", type=_names, metavar="NAME,...", help=f"of {', '.join(CONTENDERS)}")
    add("--ablate", action="store_true", help="also synco with one thing changed at a time")
    add("--data", type=Path, metavar="DIR", help="also synco_from_files: synco fed by our loader from these images")
    add("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    add("--arch", help="default: resnet50 on cuda, resnet18 on cpu")
    add("--stem", choices=("imagenet", "cifar"), help="default: imagenet on cuda, cifar on cpu")
    add("--size", type=int, help="side of an image in pixels; default: 224 on cuda, 32 on cpu")
    add("--batch", dest="batches", type=_numbers, metavar="B,...", help="one after another; default 256, 128 on cpu")
    add("--queue", type=int, help="K, default 65536")
    add("--dim", type=int, help="D, default 128")
    add("--n-hard", type=int, help="N of MoCHi and SynCo, default 1024")
    add("--group", type=int, help="samples of a group of split batch norm, default 32")
    add("--precision", choices=tuple(_DTYPES), help="default: bf16 on cuda, fp32 on cpu")
    add("--threads", type=int, help="of PyTorch on the CPU; default: its own choice")
    add("--rounds", type=int, help="how often each is timed at most; default 20 on cuda, 10 on cpu")
    add("--steps", type=int, help="of each contender in a round; default 20 on cuda, 1 on cpu")
    add("--warm-up", type=int, help="rounds before, not counted; default 1")
    add("--seconds", type=float, default=1200.0, help="of timing at each batch, then no round begins (default 1200)")
    add("--quick", action="store_true", help="tiny sizes, 2 rounds, nothing compiled: shows that it runs, and no more")
    add(
        "--output", type=Path, metavar="FILE", help="rows are added to it; default: by device and date in bench/results"
    )
    return parser


def _completed(options: argparse.Namespace) -> argparse.Namespace:
    """Defaults that depend on others, and what neither argparse nor the configuration checks."""
    cuda = torch.cuda.is_available()
    if options.device == "cuda" and not cuda:
        raise UserError("--device cuda: PyTorch finds no CUDA device here; use --device cpu")
    options.device = options.device or ("cuda" if cuda else "cpu")
    defaults = {
        "threads": torch.get_num_threads(),
        "steps": 20 if options.device == "cuda" and not options.quick else 1,
        "only": [name for name in CONTENDERS if not (options.quick and name in _COMPILED)],
        **_COMMON,
        **_DEFAULTS[options.device],
        **(_DEFAULTS["quick"] | {"dim": 64, "group": 4} if options.quick else {}),
    }
    for name, value in defaults.items():
        given = getattr(options, name)
        setattr(options, name, value if given is None else given)
    for name in ("threads", "rounds", "steps", "warm_up", "n_hard"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be >= 1, got {value}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = _parser().parse_args(arguments)
    try:
        options = _completed(options)
        torch.set_num_threads(options.threads)
        print(step_rows.table(run(options)))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
