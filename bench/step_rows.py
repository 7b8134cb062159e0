"""The rows of bench.step: what each holds, how one is made from what was measured, and the table printed at the end."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from bench.measure import ENOUGH_ROUNDS, paired_ratio, quantiles
from bench.rows import Row, rounded
from synco_fast.config import Config
from synco_fast.ops import KINDS

BASES = ("moco_eager", "moco")
"""Whom the others' speeds are divided by."""

IMAGENET_IMAGES, EPOCHS = 1_281_167, 200

FIELDS = (
    "contender",
    "arch",
    "stem",
    "size",
    "batch",
    "K",
    "D",
    "N",
    "counts",
    "t",
    "precision",
    "bn",
    "speed",
    "images_per_second",
    "median_ms",
    "p20_ms",
    "p80_ms",
    "n",
    "steps",
    "peak_bytes",
    "model_flops",
    "peak_flops",
    "mfu",
    "hours_200_epochs",
    "ratio_to_moco_eager",
    "ratio_to_moco",
    "ms_of_each_round",
    "device",
    "threads",
    "versions",
    "commit",
    "date",
)
"""Every row has these. Those of a contender that did not run are null, and `skipped` says why.

size: side of an image. counts: synthetic negatives in the order of KINDS. bn: batch norm, with its group size. speed:
that section as it was resolved, null where the step is not ours. median_ms, p20_ms, p80_ms: of a step, over the n
rounds in `ms_of_each_round`, each of `steps` steps. peak_bytes: of a step, with all that the contender holds but the
images; on a GPU only. model_flops: of MoCo's step, the same for all. peak_flops: of a large product in this precision,
in the same rounds. mfu: the share that model_flops in median_ms are of it. hours_200_epochs: for 1,281,167 images each,
on this device alone. ratio_to_...: images a second over that contender's, paired by rounds: {median, low, high}, an
interval of 95%, whose ends are null where there were fewer than 6 rounds.
"""

NO_INTERVAL = f"fewer than {ENOUGH_ROUNDS} rounds: no interval"
"""Said where an interval would stand."""


class Timed(NamedTuple):
    """What was measured of a contender.

    Attributes:
        times: of a step in each round, ms. bases: those of BASES that ran in the same rounds, by name.
        steps: in a round. peak_bytes: or None. model_flops: of a step. peak_flops: of the device.
    """

    times: Sequence[float]
    bases: Mapping[str, Sequence[float]]
    steps: int
    peak_bytes: int | None
    model_flops: int
    peak_flops: float


def described(contender: str, config: Config, batch_norm: str | None, speed: dict[str, bool] | None) -> Row:
    """The fields that say what was asked for."""
    hard, bn = config.negatives.hard(), config.bn
    mode = batch_norm or bn.mode
    return {
        "contender": contender,
        "arch": config.model.arch,
        "stem": config.model.stem,
        "size": config.data.image_size,
        "batch": config.data.batch_size,
        "K": config.queue.size,
        "D": config.model.dim,
        "N": hard.n_hard,
        "counts": [hard.count(kind) for kind in KINDS],
        "t": config.loss.temperature,
        "precision": config.trainer.precision,
        "bn": f"{mode} {bn.group_size}" if mode in ("split", "folded") else mode,
        "speed": speed,
    }


def measured(description: Row, timed: Timed, about: Row) -> Row:
    """A row of a contender that ran."""
    ms, batch = quantiles(timed.times), description["batch"]
    per_second = 1e3 * batch / ms.median
    bases = {base: timed.bases.get(base) for base in BASES}
    ratios = {
        f"ratio_to_{base}": None if times is None else _ratio(timed.times, times) for base, times in bases.items()
    }
    row = {
        **description,
        "images_per_second": rounded(per_second),
        "median_ms": rounded(ms.median),
        "p20_ms": rounded(ms.p20),
        "p80_ms": rounded(ms.p80),
        "n": ms.n,
        "steps": timed.steps,
        "peak_bytes": timed.peak_bytes,
        "model_flops": timed.model_flops,
        "peak_flops": rounded(timed.peak_flops),
        "mfu": rounded(1e3 * timed.model_flops / ms.median / timed.peak_flops),
        "hours_200_epochs": rounded(IMAGENET_IMAGES * EPOCHS / per_second / 3600),
        **ratios,
        "ms_of_each_round": [rounded(time) for time in timed.times],
        **about,
    }
    return {field: row[field] for field in FIELDS}


def skipped(description: Row, reason: str, about: Row) -> Row:
    """A row of a contender that did not run."""
    return {**dict.fromkeys(FIELDS), **description, "n": 0, **about, "skipped": reason}


def ratio_of(row: Row, base: Row) -> Row:
    """Of the speeds of two rows of one run, paired by rounds: {median, low, high}, the latter two null as in a row."""
    return _ratio(row["ms_of_each_round"], base["ms_of_each_round"])


def _ratio(times: Sequence[float], base: Sequence[float]) -> Row:
    found: Row = {name: rounded(value) for name, value in paired_ratio(times, base)._asdict().items()}
    return found if len(times) >= ENOUGH_ROUNDS else found | {"low": None, "high": None}


_HEADER = (
    ("contender", "<34"),
    ("images/s", ">9"),
    ("ms", ">9"),
    ("p20", ">9"),
    ("p80", ">9"),
    ("n", ">4"),
    ("x moco_eager", ">19"),
    ("x moco", ">19"),
    ("GB", ">7"),
    ("MFU", ">7"),
)


def table(rows: Sequence[Row]) -> str:
    """The rows of one run as text, a block for each batch."""
    batches = dict.fromkeys(row["batch"] for row in rows)
    return "\n\n".join(_block([row for row in rows if row["batch"] == batch]) for batch in batches)


def _block(rows: Sequence[Row]) -> str:
    lines = [setting(rows[0]), " ".join(f"{name:{form}}" for name, form in _HEADER)]
    for row in rows:
        if row["median_ms"] is None:
            lines.append(f"{row['contender']:<34} {row['skipped']}")
            continue
        cells = (
            row["contender"],
            f"{row['images_per_second']:.4g}",
            *(f"{row[name]:.4g}" for name in ("median_ms", "p20_ms", "p80_ms")),
            str(row["n"]),
            *(ratio_text(row[f"ratio_to_{base}"]) for base in BASES),
            "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.3g}",
            f"{row['mfu']:.1%}",
        )
        lines.append(" ".join(f"{cell:{form}}" for cell, (_, form) in zip(cells, _HEADER, strict=True)).rstrip())
    return "\n".join([*lines, *([NO_INTERVAL] if has_few_rounds(rows) else [])])


def has_few_rounds(rows: Sequence[Row]) -> bool:
    """Whether any that was timed has too few rounds for an interval."""
    return any(0 < row["n"] < ENOUGH_ROUNDS for row in rows)


def ratio_text(ratio: Row | None) -> str:
    """The median and its interval, the median alone, or nothing."""
    if ratio is None:
        return ""
    ends = "" if ratio["low"] is None else f" [{ratio['low']:.2f}, {ratio['high']:.2f}]"
    return f"{ratio['median']:.2f}{ends}"


def setting(row: Row) -> str:
    """What all contenders of a run share, in words."""
    return (
        f"{row['arch']}, {row['stem']} stem, {row['size']} px, batch {row['batch']}, K {row['K']}, D {row['D']}, "
        f"t {row['t']}, {row['precision']}"
    )
