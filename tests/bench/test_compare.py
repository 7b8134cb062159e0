"""bench.compare tells a slower program from a slower machine and from noise."""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import compare, rows
from bench.rows import Row
from bench.step_rows import FIELDS, skipped
from tests.bench.step_rows import ABOUT, step_rows
from tests.conftest import REPOSITORY

Made = Callable[..., list[Row]]


def noisy(middle: float, seed: int, rounds: int = 40, noise: float = 0.05) -> list[float]:
    drawn = random.Random(seed)
    return [middle * drawn.lognormvariate(0, noise) for _ in range(rounds)]


def of_steps(seed: int, slower: float = 1.0, machine: float = 1.0, **other: Any) -> list[Row]:
    times = {"moco_eager": noisy(200 * machine, seed), "synco": noisy(120 * machine * slower, seed + 1)}
    return step_rows(times, **other)


def of_kernels(seed: int, slower: float = 1.0, machine: float = 1.0, **other: Any) -> list[Row]:
    found = []
    for name, setting, middle in (("moco_eager", "moco", 200.0), ("cpu", "synco", 120.0 * slower)):
        times = noisy(middle * machine, seed := seed + 1)
        found.append({**dict.fromkeys(rows.FIELDS), "contender": name, "setting": setting, "dtype": "float32"})
        found[-1] |= {"device": "Slow CPU", "threads": 2, "sweep": "default", "date": "2026", "B": 256, "K": 65536}
        found[-1] |= _summary(times, "median_ms", "p20_ms", "p80_ms") | other
    return found


def of_loader(seed: int, slower: float = 1.0, machine: float = 1.0, **other: Any) -> list[Row]:
    setting = {"batch": 64, "size": 224, "prefetch": 2, "dtype": "float32", "page_cache": "warm", "format": "files"}
    found: list[Row] = []
    for name, middle in (("synco_fast", 600.0 / slower), ("torchvision", 100.0)):
        rates = noisy(middle / machine, seed := seed + 1)
        found.append({"device": "Slow CPU", "threads": 2, "date": "2026", "contender": name, **setting})
        found[-1] |= _summary(rates, "images_per_second", "p20", "p80") | other
    # A row of another kind, which has neither a spread nor a base.
    return [
        *found,
        {"device": "Slow CPU", "threads": 2, "date": "2026", "contender": "pretrain", "images_per_second": 9.0},
    ]


def _summary(values: list[float], median: str, p20: str, p80: str) -> Row:
    ordered = sorted(values)
    places = {median: 0.5, p20: 0.2, p80: 0.8}
    return {name: ordered[int(share * len(ordered))] for name, share in places.items()} | {"n": len(ordered)}


def code(tmp_path: Path, old: list[Row], new: list[Row], *arguments: str) -> int:
    for name, found in (("old", old), ("new", new)):
        path = tmp_path / f"{name}.jsonl"
        path.unlink(missing_ok=True)
        rows.append(path, found)
    return compare.main([str(tmp_path / "old.jsonl"), str(tmp_path / "new.jsonl"), *arguments])


KINDS = pytest.mark.parametrize("made", (of_steps, of_kernels, of_loader))


@KINDS
@pytest.mark.parametrize("seed", (100, 200, 300))
def test_noise_and_a_slower_machine_pass_and_a_slowdown_fails(
    made: Made, seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A median of 40 is off by 5% x 1.253 / sqrt(40) = 1%, and 4 of them together by 2%: 10% are five times that.
    assert code(tmp_path, made(0), made(seed)) == 0
    assert code(tmp_path, made(0), made(seed, machine=1.5)) == 0
    assert "SLOWER" not in capsys.readouterr().out
    assert code(tmp_path, made(0), made(seed, slower=1.1)) == 1
    assert code(tmp_path, made(0), made(seed, slower=1.1, machine=0.5)) == 1
    printed = capsys.readouterr().out
    assert printed.count("SLOWER") == 2 and "1 compared to" in printed and "1 slower by more than 3%" in printed
    assert code(tmp_path, made(0), made(seed, slower=1.1), "--tolerance", "0.2") == 0
    assert code(tmp_path, made(0), made(seed, slower=0.9)) == 0


def test_a_change_within_the_noise_of_few_rounds_passes(tmp_path: Path) -> None:
    old, new = (
        step_rows({"moco_eager": [100.0, 140.0, 90.0] * 2, "synco": times * 2})
        for times in ([50, 75, 40], [55, 60, 52])
    )
    assert code(tmp_path, old, new) == 0


def test_fewer_than_6_rounds_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert code(tmp_path, of_steps(0), step_rows({"moco_eager": [2.0] * 5, "synco": [1.0] * 5})) == 2
    assert f"{tmp_path / 'new.jsonl'}: synco / moco_eager has n = 5: expected 6 or more" in capsys.readouterr().err


def test_the_more_rows_the_more_is_wanted_of_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A change that leaves no doubt of 95% alone, and some beside 19 other rows.

    13 of 40 rounds are as fast as before. Drawn anew, more than half are with a probability of 0.7%, as the binomial
    distribution has it: less than 2.5%, more than 2.5% / 20.
    """
    before, after = [100.0] * 40, [100.0] * 13 + [110.0] * 27
    times = {"moco_eager": [100.0] * 40, "synco": before}
    others = {f"synco {number}": before for number in range(19)}
    assert code(tmp_path, step_rows(times), step_rows({**times, "synco": after})) == 1
    assert "intervals of 95.00% each, of 95% together" in capsys.readouterr().out
    assert code(tmp_path, step_rows(times | others), step_rows({**times, **others, "synco": after})) == 0
    printed = capsys.readouterr().out
    assert "synco / moco_eager: +10.0% of time [+0.0%, +10.0%]" in printed and "intervals of 99.75% each" in printed


def test_a_run_without_plain_moco_is_divided_by_the_next_best(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = {"moco_eager": [2.0] * 6, "synco": [1.0] * 6}
    ours = {"moco": [3.0] * 6, "synco": [2.0] * 6}
    ablated = {"synco": [4.0] * 6, "synco bn.mode=plain": [2.0] * 6}
    alone = {"mochi": [1.0] * 6}
    old = [row for year, times in enumerate((main, ours, ablated, alone)) for row in step_rows(times, date=f"{year}")]
    asked = {name: old[0][name] for name in FIELDS[: FIELDS.index("images_per_second")]}
    failed = skipped({**asked, "contender": "published"}, "out of memory", {**ABOUT, "date": "0"})
    ablated["synco bn.mode=plain"] = [2.2] * 6
    new = [row for year, times in enumerate((main, ours, ablated)) for row in step_rows(times, date=f"{year}")]
    assert code(tmp_path, [*old, failed], new) == 1
    lines = capsys.readouterr().out.splitlines()
    path = tmp_path / "old.jsonl"
    assert f"published: not compared, out of memory; {path}, 0" in lines
    assert f"mochi: not compared, its run has no moco_eager or moco or synco; {path}, 3" in lines
    compared = [line.partition(":")[::2] for line in lines if "% of time" in line]
    assert [(re.split(r" [(/]", name)[0], name.rpartition(" / ")[2]) for name, _ in compared] == [
        ("synco", "moco_eager"),
        ("synco", "moco"),
        ("synco bn.mode=plain", "synco"),
    ]
    assert [said.split()[0] for _, said in compared] == ["+0.0%", "+0.0%", "+10.0%"]
    assert "3 compared to moco_eager, moco, synco within each run, 1 slower" in lines[-1]


def test_rows_on_one_side_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    times = {"moco_eager": [2.0] * 6, "moco": [1.0] * 6}
    assert code(tmp_path, step_rows({**times, "mochi": [1.0] * 6}), step_rows({**times, "synco": [1.0] * 6})) == 0
    printed = capsys.readouterr().out
    assert "moco (" in printed and "+0.0% of time" in printed
    assert f"only in {tmp_path / 'old.jsonl'}" in printed and f"only in {tmp_path / 'new.jsonl'}" in printed


@pytest.mark.parametrize(
    ("old", "new", "message"),
    (
        (of_steps(0), of_steps(0, device="Fast CPU"), "device is Slow CPU in the one and Fast CPU in the other"),
        (of_steps(0), of_steps(0, threads=4), "threads is 2 in the one and 4 in the other"),
        (of_steps(0), of_steps(0, batch=128, dim=64), "batch is 64 in the one and 128 in the other; D is 128"),
        (of_kernels(0), of_kernels(0, K=4096), "K is 65536 in the one and 4096 in the other"),
        (of_loader(0), of_loader(0, threads=1), "threads is 2 in the one and 1 in the other"),
        (of_steps(0), of_kernels(0), "rows of bench.step and"),
        (step_rows({"mochi": [1.0] * 6}), of_steps(0), "no row of moco_eager or moco or synco"),
        (of_steps(0)[1:], of_steps(0), "no row of the one has the sizes, device and plain contender"),
        ([{"a": 1}], of_steps(0), "line 1: expected a row of bench.kernels, bench.step, bench.loader"),
    ),
)
def test_what_cannot_be_compared_is_refused(
    old: list[Row], new: list[Row], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code(tmp_path, old, new) == 2
    assert message in capsys.readouterr().err


def test_ratios_to_different_bases_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As in a loader's run with --vary, whose changes of one setting may meet the other run's setting."""
    old, new = of_loader(0), of_loader(0, threads=4)
    varied = {**new[0], "threads": 2}
    assert code(tmp_path, old, [*new, varied]) == 2
    assert "no row of the one has" in capsys.readouterr().err


def test_results_that_are_kept_can_be_compared(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(REPOSITORY / "bench/results/kernels-cpu-2026-11-25.jsonl")
    assert compare.main([path, path]) == 0
    assert " 0 slower" in capsys.readouterr().out


def test_kept_results_of_few_rounds_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(REPOSITORY / "bench/results/loader-cpu-2026-11-25.jsonl")
    assert compare.main([path, path]) == 2
    printed = capsys.readouterr()
    assert "has n = 5: expected 6 or more" in printed.err
    assert "pretrain: not compared, has no rounds" in printed.out, "a row of another kind"


def test_a_file_that_is_none_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "old.jsonl"
    assert compare.main([str(path), str(path)]) == 2 and "old.jsonl" in capsys.readouterr().err
    path.write_text(json.dumps(of_steps(0)[0]) + "\n{\n")
    assert compare.main([str(path), str(path)]) == 2 and "line 2: not JSON" in capsys.readouterr().err
    assert compare.main([str(path), str(path), "--tolerance", "-1"]) == 2
    assert "--tolerance must be >= 0, got -1.0" in capsys.readouterr().err
