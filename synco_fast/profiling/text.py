"""A profile as a table of text, for the terminal."""

from typing import Any


def table(result: dict[str, Any]) -> str:
    """Stages, the op, what each kind costs, and the verdict."""
    parts = [_stages(result), _op(result), _kinds(result["op"]), _totals(result), _verdict(result["verdict"])]
    return "\n\n".join(part for part in parts if part)


def milliseconds(value: float) -> str:
    """Three significant digits, but never less than 100 ns."""
    digits = next((digits for least, digits in ((100, 0), (10, 1), (1, 2), (0.1, 3)) if abs(value) >= least), 4)
    return f"{value:,.{digits}f}"


def interval(difference: dict[str, Any]) -> str:
    """A median with its 95% interval."""
    low, high = milliseconds(difference["low_ms"]), milliseconds(difference["high_ms"])
    return f"{milliseconds(difference['median_ms'])} [{low}, {high}]"


def agreement(row: dict[str, Any]) -> str:
    """Whether the clock's figure lies in the interval of leaving the kind out."""
    return {None: "-", True: "yes", False: "no"}[row["agrees"]]


def aligned(rows: list[list[str]]) -> str:
    """Columns, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def stage_rows(step: dict[str, Any]) -> list[list[str]]:
    """Header, stages, what is left, and the step."""
    rows = [["stage", "median ms", "p20", "p80", "share"]]
    whole = {"step": step["time"] | {"share": 1.0}}
    for name, row in (step["stages"] | whole).items():
        times = [milliseconds(row[key]) for key in ("median_ms", "p20_ms", "p80_ms")]
        rows.append([name, *times, f"{row['share']:.1%}"])
    return rows


def kind_rows(op: dict[str, Any]) -> list[list[str]]:
    """Header and kinds, then all of them together, the selection of the hard set with them."""
    rows = [["kind", "vectors", "left out: ms [95%]", "own phase ms", "with draws, parents", "agree"]]
    for row in op["kinds"]:
        clocked = ["-" if row[key] is None else milliseconds(row[key]) for key in ("own_phase_ms", "clock_ms")]
        rows.append([row["kind"], str(row["count"]), interval(row["left_out"]), *clocked, agreement(row)])
    total = str(sum(row["count"] for row in op["kinds"]))
    return [*rows, ["all of them", total, interval(op["synthetic"]), "", "", ""]]


def phase_rows(result: dict[str, Any]) -> list[list[str]]:
    """Header and phases of the op, times being shares of the op's stage."""
    stage = result["step"]["stages"]["op"]["median_ms"]
    return [
        ["phase of the op", "ms", "share"],
        *([name, milliseconds(share * stage), f"{share:.1%}"] for name, share in result["op"]["phases"].items()),
    ]


def overhead(added: dict[str, Any]) -> str:
    """What synthetic negatives add to a step, in words."""
    return f"{interval(added['added'])} ms, {added['share_of_without']:+.1%} of a step without them"


def _stages(result: dict[str, Any]) -> str:
    return aligned(stage_rows(result["step"]))


def _op(result: dict[str, Any]) -> str:
    op = result["op"]
    shape = " ".join(f"{name} {size}" for name, size in op["shape"].items())
    head = (
        f"op: backend {op['backend']}, {shape}, {op['dtype']} queue: {milliseconds(op['time']['median_ms'])} ms alone"
    )
    if op["phases"] is None:
        return f"{head}\nno phases: {op['no_phases_because']}"
    return f"{head}\n{aligned(phase_rows(result))}"


def _kinds(op: dict[str, Any]) -> str:
    return aligned(kind_rows(op)) if op["kinds"] else ""


def _totals(result: dict[str, Any]) -> str:
    lines = [f"{result['step']['images_per_second']:,.1f} images/s"]
    if result["synthetic_negatives"] is not None:
        lines.append(f"synthetic negatives add {overhead(result['synthetic_negatives'])}")
    if result["configured_step"] is not None:
        lines.append(
            f"with `speed` as configured and no loader a step takes "
            f"{milliseconds(result['configured_step']['time']['median_ms'])} ms"
        )
    return "\n".join(lines)


def _verdict(verdict: dict[str, Any]) -> str:
    advice = [f"  {row['key']} (now {row['now']}): {row['set']}" for row in verdict["advice"]]
    return "\n".join([f"{verdict['limit']}: {verdict['evidence']}", *advice])
