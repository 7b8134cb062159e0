"""The rows of a kernel benchmark: what each holds, reading and writing them, and the table printed at the end."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.case import Case
from bench.contenders import CONTENDERS
from bench.measure import Peaks, Quantiles
from synco_fast.errors import UserError
from synco_fast.ops import KINDS

Row = dict[str, Any]

FIELDS = (
    "sweep",
    "x",
    "contender",
    "setting",
    "B",
    "K",
    "D",
    "N",
    "counts",
    "t",
    "dtype",
    "median_ms",
    "p20_ms",
    "p80_ms",
    "n",
    "peak_extra_bytes",
    "flops",
    "bytes",
    "floor_ms",
    "share_of_floor",
    "peak_flops",
    "peak_bandwidth",
    "device",
    "threads",
    "versions",
    "commit",
    "date",
)
"""Every row has these. Those of a contender that did not run are null, and `skipped` says why.

sweep, x: the sweep and the value of what it varies, null where that is no number. setting: the negatives' name; empty
for a contender that is absent altogether. counts: synthetic negatives in the order of KINDS. dtype: of the queue, as
this contender holds it. floor_ms: max(flops / peak_flops, bytes / peak_bandwidth). share_of_floor: floor_ms /
median_ms. The peaks are those measured in the run with products of this dtype.
"""


def rounded(value: float) -> float:
    """To the 5 digits that a row keeps."""
    return float(f"{value:.5g}")


def measured(case: Case, times: Quantiles, extra: int | None, peaks: Peaks, about: Row) -> Row:
    """A row of a case that ran. about: sweep, x, device, threads, versions, commit, date."""
    contender = CONTENDERS[case.contender]
    flops, moved = contender.flops(case), contender.bytes(case)
    floor = 1e3 * max(flops / peaks.flops, moved / peaks.bandwidth)
    row = {
        **about,
        **_described(case),
        "median_ms": rounded(times.median),
        "p20_ms": rounded(times.p20),
        "p80_ms": rounded(times.p80),
        "n": times.n,
        "peak_extra_bytes": extra,
        "flops": flops,
        "bytes": moved,
        "floor_ms": rounded(floor),
        "share_of_floor": rounded(floor / times.median),
        "peak_flops": rounded(peaks.flops),
        "peak_bandwidth": rounded(peaks.bandwidth),
    }
    return {field: row[field] for field in FIELDS}


def skipped(case: Case, reason: str, about: Row) -> Row:
    """A row of a case that did not run."""
    return {**dict.fromkeys(FIELDS), **about, **_described(case), "n": 0, "skipped": reason}


def _described(case: Case) -> Row:
    return {
        "contender": case.contender,
        "setting": case.setting,
        "B": case.batch,
        "K": case.queue,
        "D": case.dim,
        "N": case.hard.n_hard,
        "counts": [case.hard.count(kind) for kind in KINDS],
        "t": case.temperature,
        "dtype": case.dtype,
    }


def append(path: Path, rows: Sequence[Row]) -> None:
    """Add rows to a file, one line each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)


def read(path: Path, fields: Sequence[str] = FIELDS, command: str = "bench.kernels") -> list[Row]:
    """A file's rows, which must have these fields; `command` names in errors what writes such rows.

    Raises:
        UserError: a line is not such a row.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            raise UserError(f"{path}, line {number}: not JSON; expected rows of python -m {command}") from None
        missing = [field for field in fields if field not in row] if isinstance(row, dict) else list(fields)
        if missing:
            raise UserError(f"{path}, line {number}: expected a row of python -m {command}; no {missing[0]} in it")
        rows.append(row)
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows of one run as text, a block for each point of a sweep: times and memory, against plain MoCo's loss, and
    against the published loss with the same negatives."""
    blocks: dict[tuple[str, float | None], list[Row]] = {}
    for row in rows:
        blocks.setdefault((row["sweep"], row["x"]), []).append(row)
    return "\n\n".join(_block(sweep, x, block) for (sweep, x), block in blocks.items())


_HEADER = (
    ("contender", "<22"),
    ("setting", "<13"),
    ("dtype", "<9"),
    ("ms", ">9"),
    ("p20", ">9"),
    ("p80", ">9"),
    ("n", ">4"),
    ("/ moco", ">7"),
    ("/ publ.", ">8"),
    ("MB", ">8"),
    ("/ moco", ">7"),
    ("of floor", ">9"),
)


def _block(sweep: str, x: float | None, rows: Sequence[Row]) -> str:
    base = next((row for row in rows if row["contender"] == "moco_eager"), {})
    publisheds = {row["setting"]: row["median_ms"] for row in rows if row["contender"] == "published"}
    sizes = ", ".join(f"{name} {rows[0][name]}" for name in ("B", "K", "D"))
    point = "" if x is None else f" {x:g}"
    lines = [f"{sweep}{point}: {sizes}, N {max(row['N'] for row in rows)}, t {rows[0]['t']}"]
    lines.append(" ".join(f"{name:{form}}" for name, form in _HEADER).rstrip())
    for row in rows:
        head = f"{row['contender']:<22} {row['setting']:<13}"
        if row["median_ms"] is None:
            lines.append(f"{head} {row['skipped']}")
            continue
        extra = row["peak_extra_bytes"]
        cells = (
            row["dtype"],
            f"{row['median_ms']:.4g}",
            f"{row['p20_ms']:.4g}",
            f"{row['p80_ms']:.4g}",
            str(row["n"]),
            _ratio(row["median_ms"], base.get("median_ms")),
            _ratio(row["median_ms"], publisheds.get(row["setting"])),
            "" if extra is None else f"{extra / 1e6:.4g}",
            _ratio(extra, base.get("peak_extra_bytes")),
            f"{row['share_of_floor']:.1%}",
        )
        lines.append(" ".join((head, *(f"{cell:{form}}" for cell, (_, form) in zip(cells, _HEADER[2:], strict=True)))))
    return "\n".join(lines)


def _ratio(value: float | None, base: float | None) -> str:
    return f"{value / base:.2f}" if value is not None and base else ""
