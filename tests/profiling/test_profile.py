"""`synco-fast profile` from the console: what it writes is consistent with itself, and errors are told before work."""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from synco_fast import stages
from synco_fast.ops import KINDS
from synco_fast.profiling.profile import FILES
from tests.command import Finished, call, check_refused_there
from tests.conftest import REPOSITORY, environment
from tests.page import check_self_contained, read

STEPS, ROUNDS = 3, 4
SHORT = ["--steps", str(STEPS), "--rounds", str(ROUNDS)]
SMALL = ["--set", "model.arch=resnet10_narrow"]
ALONE = {*stages.STAGES} - {"gather"}
HOSTILE = """"'><script>alert(1)<img src=x onerror=alert(2)>&amp;$title ${x}\udcff"""
SECTIONS = (
    "What limits you",
    "Stages of the step",
    "Inside the op",
    "What synthetic negatives cost",
    "Memory over a step",
    "Top operators",
)


def profile(config: Path, output: Path, *options: object) -> Finished:
    done = call("profile", config, "--output", output, *SHORT, *options)
    assert done.code == 0, done.err
    return done


def result(output: Path) -> dict[str, Any]:
    assert sorted(path.name for path in output.iterdir()) == sorted(FILES)
    return json.loads((output / "profile.json").read_text())


def check_consistent(found: dict[str, Any], expected: set[str]) -> None:
    """Stages and what is left are the step, to the nanosecond, and shares are shares of all of it."""
    step = found["step"]
    assert len(step["per_step"]) == found["about"]["steps"] == STEPS
    for row in step["per_step"]:
        assert set(row["stages_ns"]) == expected
        assert min(row["stages_ns"].values()) > 0 and row["unattributed_ns"] >= 0
        assert sum(row["stages_ns"].values()) + row["unattributed_ns"] == row["step_ns"]
    assert set(step["stages"]) == {*expected, "unattributed"}
    assert sum(row["share"] for row in step["stages"].values()) == pytest.approx(1)
    for row in (*step["stages"].values(), step["time"]):
        assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
    whole = sum(row["step_ns"] for row in step["per_step"]) / 1e9
    assert step["images_per_second"] == pytest.approx(STEPS * found["about"]["config"]["data"]["batch_size"] / whole)


def check_kinds(op: dict[str, Any], kinds: tuple[str, ...]) -> None:
    """Each kind in use was left out in every round, and no other."""
    assert [row["kind"] for row in op["kinds"]] == list(kinds)
    assert set(op["rounds_ns"]) == {"all", "none", *kinds}
    assert all(len(column) == ROUNDS for column in op["rounds_ns"].values())
    for row in op["kinds"]:
        differences = [a - b for a, b in zip(op["rounds_ns"]["all"], op["rounds_ns"][row["kind"]], strict=True)]
        left_out = row["left_out"]
        assert min(differences) - 1 <= 1e6 * left_out["low_ms"] <= 1e6 * left_out["median_ms"] + 1e-3
        assert 1e6 * left_out["median_ms"] <= 1e6 * left_out["high_ms"] + 1e-3 <= max(differences) + 1
        assert (row["clock_ms"] is None) == (row["agrees"] is None) == (op["phases"] is None)


def check_trace(path: Path, expected: set[str]) -> None:
    """Loadable, with every stage as a range inside each step, and none of a loader's."""
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    ranges = [event for event in events if event.get("cat") == "user_annotation"]
    whole = [(event["ts"], event["ts"] + event["dur"]) for event in ranges if event["name"] == "step"]
    assert len(whole) == 3 and "data wait" not in {event["name"] for event in ranges}
    for start, end in whole:
        assert expected <= {event["name"] for event in ranges if start <= event["ts"] <= end}


def test_with_images(images: Path, tiny: Path, tmp_path: Path) -> None:
    output = tmp_path / "profile"
    done = profile(tiny, output, "--data", images)
    found = result(output)
    check_consistent(found, {"data wait", *ALONE})
    check_kinds(found["op"], KINDS)
    check_trace(output / "trace.json.gz", ALONE)
    assert found["op"]["shape"] == {"B": 16, "K": 64, "D": 16} and found["op"]["dtype"] == "float16"
    assert found["about"]["images"] == 100 and found["configured_step"] is None
    assert found["verdict"]["numbers"]["data_wait"] == found["step"]["stages"]["data wait"]["share"]
    assert len(found["synthetic_negatives"]["rounds_ns"]["with"]) == ROUNDS
    for device, points in found["memory"]["devices"].items():
        assert device == "cpu" and max(size for _, size in points) > 0
        assert [time for time, _ in points] == sorted(time for time, _ in points)
    assert any("conv" in row["name"] for row in found["operators"])
    assert found["op"]["fastest_backend"] == found["op"]["backend"], "auto"
    for shown in (*found["step"]["stages"], *KINDS, found["verdict"]["limit"], str(output / "report.html")):
        assert shown in done.out, shown
    assert "stage by stage" in done.err
    check_self_contained(output / "report.html")
    page = read(output / "report.html")
    for shown in (*SECTIONS, *KINDS, "data wait", found["verdict"]["evidence"], "warmup_epochs: 1"):
        assert shown in page.text, shown
    assert page.tags.count("svg") >= 3
    assert not list(tmp_path.rglob("checkpoints")), "no run was begun"


def test_noise_in_place_of_images(tiny: Path, tmp_path: Path) -> None:
    """MoCHi has two kinds. The bound on what no stage claims is a loose one: steps take a tenth of a second, and the
    calls between stages under a millisecond where nothing else keeps the machine busy.
    """
    mochi = "negatives={n_hard: 16, mixed: 4, interpolated: 4, warmup_epochs: 1}"
    output = tmp_path / HOSTILE
    config = tiny.rename(tiny.with_name(f"{HOSTILE}.yaml"))
    profile(config, output, "--synthetic", "--set", "method=mochi", "--set", mochi)
    found = result(output)
    check_consistent(found, ALONE)
    assert found["step"]["stages"]["unattributed"]["share"] < 0.1
    check_kinds(found["op"], ("interpolated", "mixed"))
    assert found["verdict"]["numbers"]["data_wait"] is None
    check_self_contained(output / "report.html")
    page = read(output / "report.html")
    assert HOSTILE.replace("\udcff", "?") + ".yaml in " in page.text
    assert "img" not in page.tags and "script" not in page.tags

    config = config.rename(tiny)
    moco = ["--set", "method=moco", "--set", "loss.backend=eager", "--set", "negatives={n_hard: 0, warmup_epochs: 0}"]
    none = [part for kind in KINDS for part in ("--set", f"negatives.{kind}=0")]
    profile(config, output, "--synthetic", *moco, *none, *SMALL)  # in place of the earlier one
    found = result(output)
    check_kinds(found["op"], ())
    assert found["synthetic_negatives"] is None and found["op"]["synthetic"] is None
    assert found["op"]["phases"] is None and "backend eager has no clocks" in found["op"]["no_phases_because"]
    page = read(output / "report.html")
    assert SECTIONS[3] not in page.text and SECTIONS[4] in page.text


def test_two_processes(tiny: Path, tmp_path: Path) -> None:
    """Both take the steps, one writes; gathering has a stage of its own."""
    output = tmp_path / "profile"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "synco_fast"]
    options = ["--synthetic", *SHORT, *SMALL, "--set", "bn.mode=shuffle", "--output", str(output)]
    done = subprocess.run(
        [*launch, "profile", str(tiny), *options],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = result(output)
    check_consistent(found, {*stages.STAGES})
    assert found["about"]["processes"] == 2 and found["op"]["shape"]["B"] == 8
    assert found["verdict"]["numbers"]["communication"] >= found["step"]["stages"]["gather"]["share"]
    assert done.stdout.count("report: ") == 1


def test_errors_come_before_work(images: Path, tiny: Path, tmp_path: Path) -> None:
    output = tmp_path / "profile"
    there = ("profile", tiny, "--output", output)
    check_refused_there(output, *there, "--synthetic", names=("notes.txt", "no profile left there"))
    for file in output.iterdir():
        file.unlink()
    output.rmdir()
    for options, names in (
        ([], ("data.root is not set", "--data DIR")),
        (["--data", tmp_path / "nowhere"], ("nowhere",)),
        (["--data", images, "--synthetic"], ("--synthetic", str(images))),
        (["--synthetic", "--rounds", "2"], ("--rounds",)),
        (["--synthetic", "--set", "loss.backend=cuda"], ("loss.backend = cuda",)),
        (["--synthetic", "--set", "speed.cuda_graph=true"], ("speed.cuda_graph", "needs a GPU")),
        (["--synthetic", "--set", "bn.mode=shuffle"], ("bn.mode = shuffle",)),
    ):
        done = call(*there, *options)
        assert done.code in (1, 2) and done.out == "" and "Traceback" not in done.err, done.err
        assert all(name in done.err for name in names), done.err
        assert not output.exists()
    output.write_text("somebody's")
    done = call(*there, "--synthetic")
    assert done.code == 1 and "expected a folder" in done.err
    assert output.read_text() == "somebody's"
