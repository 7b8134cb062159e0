"""Tables and figures of bench.report say what the rows say."""

from pathlib import Path

import pytest

from bench import report, rows
from bench.rows import Row
from bench.step_rows import FIELDS, skipped
from tests.bench.step_rows import ABOUT, step_rows

TIMES = {
    "moco_eager": [200.0, 220.0, 180.0] * 2,
    "moco": [100.0, 110.0, 90.0] * 2,
    "synco": [125.0, 137.5, 112.5] * 2,
    "synco speed.channels_last=false": [250.0, 275.0, 225.0] * 2,
}
FEW = {name: times[:5] for name, times in TIMES.items()}


def found(**about: str) -> list[Row]:
    made = step_rows(TIMES, **about)
    asked = {name: made[-1][name] for name in FIELDS[: FIELDS.index("images_per_second")]}
    return [*made, skipped({**asked, "contender": "synco bn.mode=none"}, "no such mode", {**ABOUT, **about})]


def cells(text: str) -> dict[str, list[str]]:
    """The table lines of a text by their first cell."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {first: rest for first, *rest in lines}


def test_tables_hold_the_numbers_of_the_rows() -> None:
    [shown] = report.shown(found())
    text = report.markdown(shown)
    assert text.startswith(
        "Slow CPU, 2 threads: resnet50, imagenet stem, 224 px, batch 64, K 65536, D 128, t 0.2, fp32;"
    )
    assert text.count("torch 9.9, abc1234, 2026-01-02, median of 6 rounds; in brackets: intervals of 95%.") == 2
    table = cells(text)
    # 64 images in 100 ms; 1e9 of 1e11 operations a second in a tenth of one; 256,233,400 images at 640 a second.
    moco = ["640", "100", "2.00 [2.00, 2.00]", "1.00 [1.00, 1.00]", "", "10.0%", "111 / 27.8 / 13.9"]
    assert table["`moco`"] == moco
    assert table["`moco_eager`"][2] == "1.00 [1.00, 1.00]" and table["`synco`"][2] == "1.60 [1.60, 1.60]"
    assert table["nothing"] == ["512", "125", "1.00 [1.00, 1.00]", ""]
    assert table["`speed.channels_last=false`"] == ["256", "250", "0.50 [0.50, 0.50]", ""]
    assert table["`bn.mode=none`"] == ["did not run: no such mode", "", "", ""]


def test_a_later_run_of_the_same_replaces_the_earlier_and_other_sizes_stand_beside_it() -> None:
    later, other = found(date="2027-01-01T00:00:00+00:00"), step_rows(TIMES, batch=128)
    shown = report.shown([*later, *found(), *other])
    for kind in ("main", "ablation"):
        runs = [getattr(these, kind) for these in shown]
        assert [(run[0]["date"][:4], run[0]["batch"], len(run)) for run in runs] == [("2027", 64, 5), ("2026", 128, 4)]


def test_a_later_run_of_some_contenders_takes_nothing_from_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after bench/gpu.sh: all contenders, then synco fed from files, then synco and ablations, slower that day."""
    fed = {"synco": [150.0] * 7, "synco_from_files": [300.0] * 7}
    ablated = {"synco": [250.0] * 6, "synco speed.recompute=true": [200.0] * 6}
    path = tmp_path / "rows.jsonl"
    rows.append(path, step_rows(ablated, date="2029-01-01"))
    rows.append(path, step_rows({name: TIMES[name] for name in ("moco_eager", "moco", "synco")}, date="2027-01-01"))
    rows.append(path, step_rows(fed, date="2028-01-01"))
    assert report.main([str(path), "--output", str(tmp_path / "plots")]) == 0
    assert len(list((tmp_path / "plots").iterdir())) == 1
    main, second, third = capsys.readouterr().out.split("Slow CPU, 2 threads: ")[1:]
    assert "2027-01-01, median of 6 rounds" in main and list(cells(main))[2:] == ["`moco_eager`", "`moco`", "`synco`"]
    assert cells(main)["`synco`"][1:3] == ["125", "1.60 [1.60, 1.60]"]
    assert "2028-01-01, median of 7 rounds" in second and cells(second)["`synco_from_files`"][1:4] == ["300", "", ""]
    assert "2029-01-01, median of 6 rounds" in third and cells(third)["nothing"][1] == "250"
    assert cells(third)["`speed.recompute=true`"][1:3] == ["200", "1.25 [1.25, 1.25]"]


def test_few_rounds_have_no_interval() -> None:
    made = step_rows(FEW)
    [shown] = report.shown(made)
    text = report.markdown(shown)
    assert text.count("median of 5 rounds; fewer than 6 rounds: no interval.") == 2 and "intervals" not in text
    assert cells(text)["`synco`"][2:4] == ["1.60", "0.80"] and cells(text)["nothing"][2] == "1.00"
    for figure in (report.bars(made), report.batches([made, step_rows(FEW, batch=128)])):
        assert "fewer than 6 rounds: no interval" in figure.axes[-1].get_title()
    lines = report.bars(made).axes[0].collections[0].get_segments()
    assert all(len(set(line[:, 0])) == 1 for line in lines), "of no length"


def test_figures_are_drawn_from_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    rows.append(path, [*found(), *step_rows(TIMES, batch=128)])
    assert report.main([str(path), "--output", str(tmp_path / "plots")]) == 0
    printed = capsys.readouterr()
    drawn = sorted(Path(line) for line in printed.err.splitlines())
    assert [path.name.partition("-slow-cpu")[0] for path in drawn] == ["step-batches", "step", "step"]
    assert printed.out.count("| `moco` |") == 2
    for file in drawn:
        assert file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 10_000
    assert [bar.get_width() for bar in report.bars(found()[:4]).axes[0].patches] == pytest.approx([1, 2, 1.6, 0.8])


def test_mistakes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    rows.append(path, found()[:1])
    with path.open("a") as file:
        file.write('{"contender": "moco_eager"}\n')
    assert report.main([str(path)]) == 1
    assert capsys.readouterr().err == f"error: {path}, line 2: expected a row of python -m bench.step; no arch in it\n"

    alone = tmp_path / "alone.jsonl"
    rows.append(alone, step_rows({"moco": [1.0]}))
    assert report.main([str(alone), "--output", str(tmp_path)]) == 1
    assert "no row has a ratio to moco_eager" in capsys.readouterr().err
