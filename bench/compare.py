"""Has something become slower? python -m bench.compare OLD NEW, with rows of bench.kernels, bench.step or bench.loader.

Ratios within each run are compared, never times of two runs: a machine that is slower today slows all alike. A row is
divided by its run's plain one (plain MoCo, or torchvision's loader; steps of a run without plain MoCo by our MoCo's or
SynCo's), and has a partner in the other file if both are of the same sizes on the same device. The exit code is 1 if
something became slower by more than the tolerance and its interval leaves no doubt that it is slower: the intervals of
all rows hold together with 95% (Bonferroni).
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

from torch import Tensor

from bench import rows, step_rows
from bench.measure import ENOUGH_ROUNDS, Interval, interval, quantiles, resampled_medians
from bench.rows import Row
from synco_fast.errors import UserError

_LEVEL = 0.95
_BASE = "base's "

Identity = tuple[tuple[str, str], ...]
"""Names and values that say what was measured."""


class Pair(NamedTuple):
    """A row and the one that it is divided by, of the same run."""

    row: Row
    base: Row


class Bench(NamedTuple):
    """One kind of rows.

    Attributes:
        fields: that its rows have and no other's.
        bases: the contenders that others are divided by; a run's is the first of them that it has.
        point: what rows that are divided by the same base share, besides the run.
        identity: what says what was measured.
        change: the logarithm of the new time over base's less the old one's, and its interval, with a share beyond each
            end that is its last argument.
    """

    fields: Sequence[str]
    bases: Sequence[str]
    point: Sequence[str]
    identity: Sequence[str]
    change: Callable[[Pair, Pair, float], Interval]


def _log_ratio(pair: Pair, median: str, p20: str, p80: str) -> tuple[float, float]:
    """The logarithm of row / base, and its variance.

    The median of n normal values has a standard error of 1.253 sigma / sqrt(n), and p80 - p20 is 1.683 sigma.
    """
    variance = sum(
        (1.253 * (row[p80] - row[p20]) / 1.683 / math.sqrt(row["n"]) / row[median]) ** 2
        for row in (pair.row, pair.base)
    )
    return math.log(pair.row[median] / pair.base[median]), variance


def _by_quantiles(sign: int, *names: str) -> Callable[[Pair, Pair, float], Interval]:
    """From median, p20, p80 and n. sign: 1 for times, -1 for rates."""

    def change(old: Pair, new: Pair, tail: float) -> Interval:
        (before, of_before), (after, of_after) = (_log_ratio(pair, *names) for pair in (old, new))
        middle, reach = sign * (after - before), NormalDist().inv_cdf(1 - tail) * math.sqrt(of_before + of_after)
        return Interval(middle, middle - reach, middle + reach)

    return change


def _by_rounds(old: Pair, new: Pair, tail: float) -> Interval:
    """From the times of each round: ratios are paired, and the rounds of both runs are drawn anew."""
    medians: list[float] = []
    drawn: list[Tensor] = []
    for seed, pair in enumerate((old, new)):
        times = zip(pair.row["ms_of_each_round"], pair.base["ms_of_each_round"], strict=True)
        ratios = [of_row / of_base for of_row, of_base in times]
        medians.append(quantiles(ratios).median)
        drawn.append(resampled_medians(ratios, seed, tail).log())
    return interval(math.log(medians[1] / medians[0]), drawn[1] - drawn[0], tail)


BENCHES = {
    "bench.kernels": Bench(
        rows.FIELDS,
        ("moco_eager",),
        ("sweep", "x"),
        ("device", "threads", "sweep", "x", "contender", "setting", "dtype", "B", "K", "D", "N", "counts", "t"),
        _by_quantiles(1, "median_ms", "p20_ms", "p80_ms"),
    ),
    "bench.step": Bench(
        step_rows.FIELDS,
        (*step_rows.BASES, "synco"),
        ("batch",),
        (
            *("device", "threads", "contender", "arch", "stem", "size", "batch", "K", "D", "N", "counts", "t"),
            *("precision", "bn", "steps"),
        ),
        _by_rounds,
    ),
    "bench.loader": Bench(
        ("contender", "images_per_second", "date"),
        ("torchvision",),
        (),
        ("device", "threads", "contender", "batch", "size", "prefetch", "dtype", "page_cache", "format"),
        _by_quantiles(-1, "images_per_second", "p20", "p80"),
    ),
}


def bench_of(path: Path) -> str:
    """Whose rows a file holds, by its first line.

    Raises:
        UserError: nobody's.
    """
    try:
        first = json.loads(path.read_text(encoding="utf-8").partition("\n")[0])
    except json.JSONDecodeError:
        first = None
    for name, bench in BENCHES.items():
        if isinstance(first, dict) and all(field in first for field in bench.fields):
            return name
    raise UserError(f"{path}, line 1: expected a row of {', '.join(BENCHES)}")


def pairs(found: Sequence[Row], bench: Bench, path: Path) -> dict[Identity, Pair]:
    """Every row that was measured, with its base; of several runs of the same, the last. Prints which have none.

    Raises:
        UserError: there is no base.
    """
    by_run: dict[Any, dict[str, Row]] = {}
    for row in found:
        if row.get("n") and row["contender"] in bench.bases:
            by_run.setdefault(_run(row, bench), {})[row["contender"]] = row
    runs = {run: next(those[name] for name in bench.bases if name in those) for run, those in by_run.items()}
    bases = " or ".join(bench.bases)
    if not runs:
        raise UserError(f"{path}: no row of {bases}, which the others are divided by: run it with them")
    paired = {}
    for row in sorted(found, key=lambda row: row["date"]):
        base = runs.get(_run(row, bench)) if row.get("n") else None
        if base is None:
            reason = f"its run has no {bases}" if row.get("n") else row.get("skipped") or "has no rounds"
            print(f"{row['contender']}: not compared, {reason}; {path}, {row['date']}")
        elif row is not base:
            paired[_identity(row, base, bench)] = Pair(row, base)
    return paired


def _run(row: Row, bench: Bench) -> tuple[Any, ...]:
    return row["date"], *(row.get(name) for name in bench.point)


def _identity(row: Row, base: Row, bench: Bench) -> Identity:
    """A row's own; and its base's, as ratios to different bases cannot be compared."""
    own = [(name, str(row[name])) for name in bench.identity]
    return *own, *((f"{_BASE}{name}", str(base[name])) for name in bench.identity)


def compare(old: Path, new: Path, tolerance: float) -> bool:
    """Print a line for each pair of rows; returns whether something became slower.

    Raises:
        UserError: the files have nothing in common that could be compared.
    """
    name, other = bench_of(old), bench_of(new)
    if name != other:
        raise UserError(f"{old} holds rows of {name} and {new} rows of {other}: give two files of one benchmark")
    bench = BENCHES[name]
    before, after = (pairs(rows.read(path, bench.fields, name), bench, path) for path in (old, new))
    common = [identity for identity in before if identity in after]
    if not common:
        raise UserError(f"{old} and {new} have nothing to compare: {_difference(before, after)}")
    everyone = [*before, *after]
    for path, side in ((old, before), (new, after)):
        for identity in common:
            few = min(side[identity], key=lambda row: row["n"])
            if few["n"] < ENOUGH_ROUNDS:
                name = _label(identity, everyone) if few is side[identity].row else few["contender"]
                raise UserError(f"{path}: {name} has n = {few['n']}: expected {ENOUGH_ROUNDS} or more; run more rounds")
    slower, level = 0, 1 - (1 - _LEVEL) / len(common)
    for identity in common:
        change = bench.change(before[identity], after[identity], (1 - level) / 2)
        significant = change.median > math.log1p(tolerance) and change.low > 0
        slower += significant
        print(f"{_label(identity, everyone)}: {_change_text(change)}{'  SLOWER' if significant else ''}")
    for path, here, there in ((old, before, after), (new, after, before)):
        for identity in here:
            if identity not in there:
                print(f"{_label(identity, everyone)}: only in {path}")
    bases = ", ".join(dict.fromkeys(before[identity].base["contender"] for identity in common))
    print(
        f"{len(common)} compared to {bases} within each run, {slower} slower by more than {tolerance:.0%}; "
        f"intervals of {level:.2%} each, of {_LEVEL:.0%} together"
    )
    return slower > 0


def _change_text(change: Interval) -> str:
    median, low, high = (f"{math.expm1(value):+.1%}" for value in change)
    return f"{median} of time [{low}, {high}]"


def _difference(before: Mapping[Identity, Pair], after: Mapping[Identity, Pair]) -> str:
    """What has no value in common."""
    told = []
    for name in dict(next(iter(before), ())):
        old, new = ({dict(identity)[name] for identity in side} for side in (before, after))
        if new and not old & new and not name.startswith(_BASE):
            told.append(f"{name} is {', '.join(sorted(old))} in the one and {', '.join(sorted(new))} in the other")
    return "; ".join(told) or "no row of the one has the sizes, device and plain contender of a row of the other"


def _label(identity: Identity, everyone: Sequence[Identity]) -> str:
    """What tells a row from others, in words, and its base."""
    values = [dict(one) for one in everyone]
    varied = [
        f"{name} {value}"
        for name, value in identity
        if not name.startswith(_BASE) and name not in ("contender", "counts") and len({one[name] for one in values}) > 1
    ]
    told, sizes = dict(identity), f" ({', '.join(varied)})" if varied else ""
    return f"{told['contender']}{sizes} / {told[f'{_BASE}contender']}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0, 1 where something became slower, 2 where nothing can be compared."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.add_argument("old", type=Path, metavar="OLD", help="rows of an earlier run")
    parser.add_argument("new", type=Path, metavar="NEW", help="rows of a later one")
    parser.add_argument("--tolerance", type=float, default=0.03, help="share of time that may be lost (default 0.03)")
    options = parser.parse_args(arguments)
    try:
        if not options.tolerance >= 0:
            raise UserError(f"--tolerance must be >= 0, got {options.tolerance}")
        return int(compare(options.old, options.new, options.tolerance))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
