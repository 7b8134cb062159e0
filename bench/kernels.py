"""The op against what it replaces, forward and backward, in one run on one device: python -m bench.kernels.

See bench/README.md.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench import contenders, memory, rows
from bench.about import about_run, default_output
from bench.case import DTYPES, Case, inputs
from bench.contenders import BASELINES, CONTENDERS, Step
from bench.measure import Yardstick, interleaved, quantiles
from bench.rows import Row
from synco_fast.errors import UserError
from synco_fast.ops import KINDS, HardNegatives

_NONE, _SYNCO, _MOCHI = HardNegatives.none(), HardNegatives.synco(), HardNegatives.mochi()

SWEEPS: dict[str, tuple[int, ...]] = {
    "batch": (32, 64, 128, 256, 512, 1024, 2048, 4096),
    "queue": tuple(2**power for power in range(12, 21)),
    "n_hard": (64, 128, 256, 512, 1024, 2048, 4096),
    "dim": (64, 128, 256),
    "counts": (0, 1, 2, 4),
    "kinds": (),
}
QUICK_SWEEPS = {
    "batch": (4, 8),
    "queue": (256, 512),
    "n_hard": (16, 32),
    "dim": (64, 128),
    "counts": (0, 1),
    "kinds": (),
}


@dataclass(frozen=True)
class Sizes:
    """What all cases of a point share."""

    batch: int = 256
    queue: int = 65536
    dim: int = 128
    hard: HardNegatives = _SYNCO
    mochi: HardNegatives = _MOCHI
    temperature: float = 0.2


QUICK = Sizes(8, 512, 64, HardNegatives(32, 8, 8, 8, 4, 4, 4), HardNegatives.mochi(32, 16, 4))


@dataclass(frozen=True)
class Point:
    """One point of a sweep: a table's block, whose cases are timed together."""

    sweep: str
    x: int | None
    sizes: Sizes
    settings: dict[str, HardNegatives]
    """What the op's backends are timed with; the published losses only with what is not MoCo's or MoCHi's."""


def points(sweep: str, sizes: Sizes, quick: bool) -> list[Point]:
    """The points of a sweep; "default" is the one at the given sizes, "all" is every sweep with it."""
    if sweep == "all":
        return [point for name in ("default", *SWEEPS) for point in points(name, sizes, quick)]
    if sweep == "default":
        return [Point(sweep, None, sizes, {"moco": _NONE, "synco": sizes.hard, "mochi": sizes.mochi})]
    if sweep == "kinds":
        hard = sizes.hard
        alone = {kind: _with(_NONE, n_hard=hard.n_hard, **{kind: hard.count(kind)}) for kind in hard.kinds}
        return [Point(sweep, None, sizes, {"moco": _NONE, **alone})]
    found = []
    for x in (QUICK_SWEEPS if quick else SWEEPS)[sweep]:
        if sweep == "n_hard":
            varied = replace(sizes, hard=replace(sizes.hard, n_hard=x))
        elif sweep == "counts":
            varied = replace(sizes, hard=_times(sizes.hard, x))
        else:
            change: dict[str, Any] = {sweep: x}
            varied = replace(sizes, **change)
        found.append(Point(sweep, x, varied, {"moco": _NONE, "synco": varied.hard}))
    return found


def _with(hard: HardNegatives, **changes: Any) -> HardNegatives:
    return replace(hard, **changes)


def _times(hard: HardNegatives, factor: int) -> HardNegatives:
    return _with(hard, **{kind: factor * hard.count(kind) for kind in KINDS}) if factor else _NONE


def cases(point: Point, names: Sequence[str], dtypes: Sequence[str], device: str) -> list[Case]:
    """What is timed at a point, plain MoCo first. The losses in PyTorch take the first dtype only."""
    found = []
    for name in names:
        for dtype in dtypes[:1] if name in BASELINES else dtypes:
            for setting, hard in point.settings.items():
                if name in BASELINES and (setting == "mochi" or (setting == "moco") != (name == "moco_eager")):
                    continue
                found.append(_case(name, setting, hard, point.sizes, dtype, device))
    return found


def _case(name: str, setting: str, hard: HardNegatives, sizes: Sizes, dtype: str, device: str) -> Case:
    dtype = contenders.held_dtype(name, dtype, device)
    return Case(name, setting, sizes.batch, sizes.queue, sizes.dim, hard, sizes.temperature, dtype, device)


def measure(todo: Sequence[Case], options: argparse.Namespace, yardstick: Yardstick, about: Row) -> list[Row]:
    """Memory, then times, of cases that share their sizes; those that fail become rows that say so."""
    extra: dict[Case, int | None] = {}
    failed: dict[Case, str] = {}
    steps: dict[Case, Step] = {}
    torch.compiler.reset()
    data = {dtype: inputs(replace(todo[0], dtype=dtype)) for dtype in {case.dtype for case in todo}}
    for case in todo:
        try:
            # On a CPU first: a step that needs more memory than there is ends the process it runs in.
            if options.memory and options.device == "cpu":
                extra[case] = memory.of_case_on_cpu(case, options.threads)
            step = CONTENDERS[case.contender].build(case, data[case.dtype])
            step()
            if options.memory and options.device == "cuda":
                extra[case] = memory.of_step_on_gpu(step)
            steps[case] = step
        except Exception as error:
            # Refusals of a backend, failures of the compiler, memory: all are results, and none ends the others' run.
            failed[case] = str(error).strip().partition("\n")[0] or type(error).__name__
    times = interleaved(
        {**steps, **yardstick.steps},
        options.device,
        warm_up=options.warm_up,
        rounds=options.rounds,
        seconds=options.seconds,
    )
    return [
        rows.skipped(case, failed[case], about)
        if case in failed
        else rows.measured(case, quantiles(times[case]), extra.get(case), yardstick.peaks(times, case.dtype), about)
        for case in todo
    ]


def run(options: argparse.Namespace) -> list[Row]:
    """Measure every point, write its rows as they come, and return all of them."""
    sizes = _sizes(options)
    present = [name for name in options.only if contenders.absent(name, options.device) is None]
    yardstick = Yardstick(options.device, options.dtypes, quick=options.quick)
    about = about_run(options.device, ["triton"])
    output = options.output or default_output("kernels", about)
    done: list[Row] = []
    todo = points(options.sweep, sizes, options.quick)
    for number, point in enumerate(todo, start=1):
        here = {"sweep": point.sweep, "x": point.x, **about}
        print(
            f"{number} of {len(todo)}: {point.sweep}{'' if point.x is None else f' {point.x}'}",
            file=sys.stderr,
            flush=True,
        )
        found = (
            measure(cases(point, present, options.dtypes, options.device), options, yardstick, here) if present else []
        )
        if number == 1:
            for name in options.only:
                reason = contenders.absent(name, options.device)
                if reason is not None:
                    case = _case(name, "", _NONE, sizes, options.dtypes[0], options.device)
                    found.append(rows.skipped(case, reason, here))
        rows.append(output, found)
        done += found
    print(f"wrote {output}", file=sys.stderr)
    return done


def _sizes(options: argparse.Namespace) -> Sizes:
    """The sizes asked for, the rest as `--quick` or the defaults have it."""
    sizes = QUICK if options.quick else Sizes()
    for name in ("batch", "queue", "dim", "temperature"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name} must be > 0, got {value}")
        if value is not None:
            sizes = replace(sizes, **{name: value})
    hard = (
        sizes.hard if options.counts is None else replace(sizes.hard, **dict(zip(KINDS, options.counts, strict=True)))
    )
    n_hard = hard.n_hard if options.n_hard is None else options.n_hard
    if not 0 < n_hard <= sizes.queue:
        raise UserError(f"--n-hard must lie in [1, {sizes.queue}], the rows of the queue (--queue), got {n_hard}")
    return replace(sizes, hard=replace(hard, n_hard=n_hard), mochi=replace(sizes.mochi, n_hard=n_hard))


def _counts(text: str) -> list[int]:
    counts = [int(part) for part in text.split(",")]
    if len(counts) != len(KINDS) or min(counts) < 0:
        raise ValueError
    return counts


def _names(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in CONTENDERS]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown contender {unknown[0]!r}: expected some of {', '.join(CONTENDERS)}")
    return [name for name in CONTENDERS if name in names]


def _dtypes(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in DTYPES]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown dtype {unknown[0]!r}: expected some of {', '.join(DTYPES)}")
    return list(dict.fromkeys(names))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__)
    add = parser.add_argument
    add("--sweep", choices=("default", *SWEEPS, "all"), default="default", help="what is varied (default: nothing)")
    add("--only", type=_names, default=list(CONTENDERS), metavar="NAME,...", help=f"of {', '.join(CONTENDERS)}")
    add("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    add(
        "--dtype",
        dest="dtypes",
        type=_dtypes,
        metavar="DTYPE,...",
        help=f"of the queue, of {', '.join(DTYPES)}; the losses in PyTorch take the first; "
        "default: float16 on cuda, float32 on cpu",
    )
    add("--threads", type=int, help="of PyTorch on the CPU; default: its own choice")
    add("--batch", type=int, help="B, default 256")
    add("--queue", type=int, help="K, default 65536")
    add("--dim", type=int, help="D, default 128")
    add("--n-hard", type=int, help="N, default 1024")
    add("--counts", type=_counts, metavar="N,N,N,N,N,N", help=f"of {', '.join(KINDS)}; default 256,256,256,64,64,64")
    add("--temperature", type=float, help="t, default 0.2")
    add("--rounds", type=int, help="how often each is timed at most; default 30 on cpu, 100 on cuda")
    add("--warm-up", type=int, help="rounds before, not counted; default 3")
    add("--seconds", type=float, default=60.0, help="of timing at each point, after which no round begins (default 60)")
    add("--no-memory", dest="memory", action="store_false", help="do not measure peak memory")
    add("--quick", action="store_true", help="tiny sizes and 2 rounds: shows that all of it runs, and no more")
    add(
        "--output", type=Path, metavar="FILE", help="rows are added to it; default: by device and date in bench/results"
    )
    return parser


def _completed(options: argparse.Namespace) -> argparse.Namespace:
    """Defaults that depend on others, and what argparse does not check."""
    cuda = torch.cuda.is_available()
    if options.device == "cuda" and not cuda:
        raise UserError("--device cuda: PyTorch finds no CUDA device here; use --device cpu")
    options.device = options.device or ("cuda" if cuda else "cpu")
    options.dtypes = options.dtypes or ["float16" if options.device == "cuda" else "float32"]
    defaults: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "rounds": 2 if options.quick else 100 if options.device == "cuda" else 30,
        "warm_up": 1 if options.quick else 3,
    }
    for name, value in defaults.items():
        given = getattr(options, name)
        if given is not None and given < 1:
            raise UserError(f"--{name.replace('_', '-')} must be >= 1, got {given}")
        setattr(options, name, value if given is None else given)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = _parser().parse_args(arguments)
    try:
        options = _completed(options)
        torch.set_num_threads(options.threads)
        print(rows.table(run(options)))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
