"""A line about a stage of bench/gpu.sh, from its rows and its log: python -m bench.headline STAGE OUT DEVICE NAME CODE.

OUT: the folder that holds both. DEVICE: cuda or cpu. NAME: what rows must call it. CODE: the stage's exit code. Exits
with 1 where a stage that ended with 0 did not do what it is for: nothing measured, another device, another backend.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

Row = dict[str, Any]
_WIDTH = 100


class Hollow(Exception):
    """The stage did not do what it is for."""


def build(log: str, device: str) -> str:
    """The backends and the augmentation, as `synco-fast doctor` has them; the device's own must be there."""
    wanted = {"cpu": ["cpu"], "cuda": ["cuda", "triton"]}[device]
    said = dict(re.findall(r"^  (cpu|cuda|triton|compiled, \w+) +(\S.*)$", log, re.MULTILINE))
    for name in wanted:
        if said.get(name) != "ok":
            raise Hollow(f"{name}: {said.get(name, 'doctor says nothing of it')}")
    absent = [name.replace("compiled, ", "augmentation on ") for name in said if said[name] != "ok"]
    return f"{' and '.join(wanted)} ok" + (f"; not {', '.join(absent)}" if absent else "; augmentation ok")


def tests(log: str, device: str) -> str:
    """pytest's closing lines added up, and the self-tests of the emulator."""
    counts = _pytest(log)
    if device == "cuda" and re.search(r"^SKIPPED .*(no CUDA device|no GPU)", log, re.MULTILINE):
        raise Hollow("tests were skipped for want of a GPU")
    agreed = len(re.findall(r"^passed: 0 failures$", log, re.MULTILINE))
    return f"{counts}; {agreed} of 2 self-tests on the hardware"


def sanitizer(log: str, device: str) -> str:
    """What each tool counted, in all the processes that it watched."""
    said = []
    for tool, summary in (("memcheck", "ERROR SUMMARY: {} error"), ("racecheck", "RACECHECK SUMMARY: {} hazard")):
        counts = re.findall(rf"^=+ {summary.format('([0-9]+)')}", log, re.MULTILINE)
        if not counts:
            raise Hollow(f"{tool} did not come to an end")
        said.append(f"{tool} {sum(map(int, counts))}")
    return f"{', '.join(said)} findings; {_pytest(log)}"


def _pytest(log: str) -> str:
    endings = re.findall(r"^=* ?((?:\d+ [a-z]+(?:, )?)+) in [\d.]+s", log, re.MULTILINE)
    counts: dict[str, int] = {}
    for number, what in re.findall(r"(\d+) ([a-z]+)", " ".join(endings)):
        counts[what] = counts.get(what, 0) + int(number)
    if not counts.get("passed"):
        raise Hollow("no test passed")
    return ", ".join(f"{counts[what]} {what}" for what in ("passed", "failed", "errors", "skipped") if what in counts)


def kernels(rows: list[Row], device: str) -> str:
    """The device's own backend as SynCo, against both losses in PyTorch."""
    times = {(row["contender"], row["setting"]): row["median_ms"] for row in rows}
    ours = times.get((device, "synco"))
    if ours is None:
        raise Hollow(_not_timed(rows, device))
    said = f"{device} synco {ours:.3g} ms"
    for baseline, name in ((("moco_eager", "moco"), "MoCo's"), (("published", "synco"), "published's")):
        if times.get(baseline):
            said += f", {ours / times[baseline]:.2g} of {name}"
    return said


def rates(*names: str) -> Callable[[list[Row], str], str]:
    """Images a second of these contenders, the first of which must be among them."""

    def said(rows: list[Row], device: str) -> str:
        found = {row["contender"]: row["images_per_second"] for row in rows if row.get("images_per_second")}
        if names[0] not in found:
            raise Hollow(_not_timed(rows, names[0]))
        if device == "cuda" and any(row.get("augmentation", "compiled") != "compiled" for row in rows):
            raise Hollow("plain torch made the views")
        return ", ".join(f"{name} {found[name]:.0f}" for name in names if name in found) + " images/s"

    return said


def ablation(rows: list[Row], device: str) -> str:
    """The change with which synco is the fastest, and how fast, paired by rounds."""
    times = {row["contender"]: row["ms_of_each_round"] for row in rows if row.get("ms_of_each_round")}
    if "synco" not in times:
        raise Hollow(_not_timed(rows, "synco"))
    base = times.pop("synco")
    speeds = {name: median(of / to for of, to in zip(base, times[name], strict=True)) for name in times}
    if not speeds:
        raise Hollow("no change was timed")
    best = max(speeds, key=lambda name: speeds[name])
    return f"fastest of {len(speeds)} changes: {best.removeprefix('synco ')}, {speeds[best]:.2f} of synco's images/s"


def _not_timed(rows: list[Row], contender: str) -> str:
    reasons = [str(row["skipped"]) for row in rows if row["contender"] == contender and row.get("skipped")]
    return f"{contender} was not timed: {(reasons or ['it has no row'])[0]}"


def cifar(rows: list[Row], device: str) -> str:
    """kNN accuracy at the end, with the epochs that it took."""
    trained = [row for row in rows if row["kind"] == "train"]
    measured = [row for row in rows if row["kind"] == "knn"]
    last = rows[-1]
    pace = f", {trained[-1]['timing']['images_per_second']:.0f} images/s" if trained else ""
    if not measured:
        raise Hollow(f"{last['method']}, step {last['step']}, before the kNN{pace}")
    return f"{last['method']}, {last['epochs']} epochs: kNN {measured[-1]['accuracy']:.1%}{pace}"


FROM_LOG: dict[str, Callable[[str, str], str]] = {"build": build, "tests": tests, "sanitizer": sanitizer}
FROM_ROWS: dict[str, Callable[[list[Row], str], str]] = {
    "kernels": kernels,
    "step": rates("synco", "moco_eager", "published"),
    "loader": rates("synco_fast", "torchvision", "dali_chain"),
    "end_to_end": rates("synco_from_files", "synco"),
    "cifar": cifar,
    "ablation": ablation,
}


def headline(stage: str, folder: Path, device: str, name: str) -> str:
    """The figure.

    Raises:
        Hollow: there is none, or it is of something else.
    """
    if stage in FROM_LOG:
        return FROM_LOG[stage]((folder / f"{stage}.log").read_text(encoding="utf-8", errors="replace"), device)
    path = folder / f"{stage}.jsonl"
    *lines, _ = path.read_text(encoding="utf-8").split("\n") if path.is_file() else [""]  # the last may be half a row
    rows: list[Row] = [json.loads(line) for line in lines]
    if not rows:
        raise Hollow("no rows")
    for row in rows:
        if row.get("device") != name:
            raise Hollow(f"a row is of {row.get('device')}, not of {name}")
    return FROM_ROWS[stage]([row for row in rows if row.get("date") == rows[0].get("date")], device)  # of one run


def main() -> int:
    """The command; returns its exit code."""
    stage, folder, device, name, code = sys.argv[1:]
    try:
        said, hollow = headline(stage, Path(folder), device, name), False
    except Hollow as error:
        said, hollow = str(error), True
    if code != "0" and (hollow or stage in FROM_ROWS):
        lines = (Path(folder) / f"{stage}.log").read_text(encoding="utf-8", errors="replace").split("\n")
        last = [line.strip() for line in lines if line.strip() not in ("", "Terminated")][-1:]
        said = "; ".join(([] if hollow else [said]) + last)
    print(said if len(said) <= _WIDTH else said[: _WIDTH - 3] + "...")
    return int(hollow)


if __name__ == "__main__":
    sys.exit(main())
