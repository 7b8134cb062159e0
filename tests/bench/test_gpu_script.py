"""bench/gpu.sh, rehearsed on the CPU: what fails, runs out of time or is stopped costs nothing but itself."""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from bench import cifar, compare, report
from bench.headline import Hollow, headline
from synco_fast.config import load
from synco_fast.ops import KINDS
from tests.conftest import REPOSITORY, environment

SCRIPT = REPOSITORY / "bench" / "gpu.sh"
ROWS = ("kernels", "step", "loader", "end_to_end", "cifar", "ablation")


def variables(**given: object) -> dict[str, str]:
    ours = {"STAGES", "OUT", "DATA", "CIFAR", "METHOD", "EPOCHS", "DRY_RUN"}
    inherited = {name: value for name, value in environment().items() if name not in ours}
    return inherited | {"PYTHON": sys.executable} | {name: str(value) for name, value in given.items()}


def gpu(**given: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SCRIPT], capture_output=True, text=True, env=variables(**given), cwd=REPOSITORY, check=False)


def statuses(out: Path) -> dict[str, str]:
    """The last status of each stage, and why it was skipped, if it was."""
    lines = (out / "summary.txt").read_text().splitlines()
    pattern = r"(\w+) +(ok|failed|timed out|stopped|skipped: .*)"
    return dict(found.groups() for line in lines if (found := re.match(pattern, line)))  # type: ignore[misc]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"STAGES": "build broken kernels"}, "unknown stage 'broken' in STAGES: expected some of build tests"),
        ({"DRY_RUN": "1", "METHOD": "simclr"}, "METHOD=simclr: expected moco, mochi or synco"),
        ({"DRY_RUN": "1", "EPOCHS": "ten"}, "EPOCHS=ten: expected a number above 0"),
        ({"PYTHON": "no-python"}, "there is no Python called 'no-python'"),
        ({"CUDA_VISIBLE_DEVICES": ""}, "DRY_RUN=1 rehearses it all on the CPU"),
    ],
    ids=["stage", "method", "epochs", "python", "gpu"],
)
def test_what_cannot_be_is_refused(given: dict[str, str], message: str, tmp_path: Path) -> None:
    done = gpu(OUT=tmp_path / "out", **given)
    assert done.returncode == 2 and message in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_failures_cost_themselves_and_a_second_run_mends_them(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One stage runs out of time, one has no data; then all that is not ok runs again, on images in archives."""
    out, flat, foldered = tmp_path / "out", tmp_path / "flat.tar", tmp_path / "cifar10.tar.xz"
    with tarfile.open(flat, "w") as archive:
        for path in (images / "train" / "class0").iterdir():
            archive.add(path, path.name)
    with tarfile.open(foldered, "w:xz") as archive:
        archive.add(images, "cifar10")
    given = {"DRY_RUN": 1, "OUT": out, "CIFAR": foldered, "METHOD": "mochi"}

    stages = "cifar,loader kernels, tests,build"
    done = gpu(STAGES=stages, DATA="/nonexistent", LIMIT_kernels=1, **given)
    assert done.returncode == 1, done.stdout + done.stderr
    first = {"build": "ok", "tests": "skipped: no GPU", "kernels": "timed out", "loader": "failed", "cifar": "ok"}
    assert statuses(out) == first and list(statuses(out)) == list(first), "in their own order"
    assert re.search(r"^loader +failed \(1\) .* error: data folder /nonexistent does not exist", done.stdout, re.M)
    trained = rows_of(out / "cifar.jsonl")
    assert [row["kind"] for row in trained] == ["train"] * 5 + ["knn"]
    assert {(row["method"], row["epochs"], row["batch"]) for row in trained} == {("mochi", 1, 20)}
    assert re.search(r"^cifar +ok +\d+s  mochi, 1 epochs: kNN [\d.]+%, \d+ images/s$", done.stdout, re.M)

    done = gpu(DATA=flat, **given)
    with tarfile.open(out / "logs.tar") as archive:
        logs = {name: archive.extractfile(name).read().decode() for name in archive.getnames()}  # type: ignore[union-attr]
    expected = first | {"sanitizer": "skipped: no GPU", "kernels": "ok", "step": "ok", "loader": "ok"}
    assert statuses(out) == expected | {"end_to_end": "ok", "ablation": "ok"}, (done.stdout, logs)
    assert done.returncode == 0
    assert "cifar: ok in an earlier run; STAGES=cifar runs it again" in done.stdout
    assert rows_of(out / "cifar.jsonl") == trained
    assert {row["contender"] for row in rows_of(out / "loader.jsonl")} > {"synco_fast", "torchvision"}
    left = {"summary.txt", "logs.tar", *(f"{stage}.jsonl" for stage in ROWS)}
    assert {path.name for path in out.iterdir()} == left
    shown = done.stdout.partition("=== ")[2].splitlines()
    assert len(shown) == 12 and max(map(len, shown[1:])) <= 140, "two runs and nine stages"
    assert re.search(
        r"^ablation +ok +\d+s  fastest of \d+ changes: \S.*, \d+\.\d\d of synco's images/s$", done.stdout, re.M
    )
    is_ablated = [row["contender"].startswith("synco ") for row in rows_of(out / "step.jsonl")]
    assert len(is_ablated) == 7 and not any(is_ablated), "all that are not compiled"

    step, ablation = str(out / "step.jsonl"), str(out / "ablation.jsonl")
    assert report.main([step, ablation, "--output", str(tmp_path / "plots")]) == 0
    printed = capsys.readouterr().out
    assert all(f"| `{name}` |" in printed for name in ("moco_eager", "published", "synco", "speed.recompute=true"))
    assert compare.main([step, step]) == 2
    assert "has n = 2: expected 6 or more" in capsys.readouterr().err


def test_what_is_compiled_is_kept_for_later_runs(tmp_path: Path) -> None:
    """Not below TMPDIR, which is the run's own and is removed."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\necho "$TORCHINDUCTOR_CACHE_DIR $TRITON_CACHE_DIR $TMPDIR" >> {tmp_path}/seen\n'
        f'exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    done = gpu(DRY_RUN=1, STAGES="build", OUT=tmp_path / "out", PYTHON=python, DATA=tmp_path, CIFAR=tmp_path)
    assert done.returncode == 0
    *folders, temporary = (tmp_path / "seen").read_text().splitlines()[-1].split()
    assert folders == [f"{REPOSITORY}/build/compiled/{name}" for name in ("inductor", "triton")]
    assert not Path(temporary).exists()


def test_limits_of_all_stages_are_530_seconds() -> None:
    [limits] = re.findall(r"^declare -A LIMITS=\((.*?)\)", SCRIPT.read_text(), re.M | re.S)
    stages = re.findall(r"\[(\w+)\]=(\d+)", limits)
    assert sum(int(seconds) for _, seconds in stages) == 530
    assert re.search(r"^ALL=\((.*)\)", SCRIPT.read_text(), re.M)[1].split() == [stage for stage, _ in stages]  # type: ignore[index]


def test_a_signal_stops_it_and_all_it_started(tmp_path: Path) -> None:
    given = variables(DRY_RUN=1, STAGES="kernels,loader", OUT=tmp_path / "out", DATA=tmp_path, CIFAR=tmp_path)
    process = subprocess.Popen([SCRIPT], env=given, cwd=REPOSITORY, start_new_session=True, stdout=subprocess.DEVNULL)
    while not (tmp_path / "out" / "kernels.log").exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert statuses(tmp_path / "out") == {"kernels": "stopped"}
    assert not [pid for pid in os.listdir("/proc") if pid.isdigit() and session(pid) == process.pid]


def session(pid: str) -> int | None:
    try:
        return os.getsid(int(pid))
    except ProcessLookupError:
        return None


@pytest.mark.parametrize(
    ("method", "epochs", "counts", "warmup"),
    [
        ("moco", 1, (0, 0, 0, 0, 0, 0), 0),
        ("moco", 10, (0, 0, 0, 0, 0, 0), 1),
        ("mochi", 10, (32, 0, 256, 0, 0, 0), 1),
        ("synco", 1, (64, 64, 64, 16, 16, 16), 0),
        ("synco", 2, (64, 64, 64, 16, 16, 16), 1),
        ("synco", 10, (64, 64, 64, 16, 16, 16), 1),
        ("synco", 60, (64, 64, 64, 16, 16, 16), 3),
        ("synco", 200, (64, 64, 64, 16, 16, 16), 10),
    ],
)
def test_a_short_run_has_the_settings_of_the_long_one(
    method: str, epochs: int, counts: tuple[int, ...], warmup: int, tmp_path: Path
) -> None:
    """The MoCo authors' demo on CIFAR-10; a quarter of the published negatives for a queue of 4096."""
    options = argparse.Namespace(method=method, epochs=epochs, device="cuda", quick=False)
    config = load(cifar.CONFIG, cifar.overrides(options, tmp_path))
    demo = (config.queue.size, config.model.momentum, config.loss.temperature, config.data.batch_size, config.optim.lr)
    assert demo == (4096, 0.99, 0.1, 512, 0.06)
    assert tuple(getattr(config.negatives, kind) for kind in KINDS) == counts
    assert (config.trainer.epochs, config.knn.every_epochs, config.negatives.warmup_epochs) == (epochs, epochs, warmup)
    assert (config.loss.backend, config.data.augmentation, config.trainer.device) == ("cuda", "compiled", "cuda")


MEASURED = {"contender": "cuda", "setting": "synco", "median_ms": 0.5, "device": "GPU"}
ABSENT = {"contender": "cuda", "setting": "", "median_ms": None, "skipped": "no nvcc", "device": "GPU"}
MOCO = {"contender": "moco_eager", "setting": "moco", "median_ms": 1.0, "device": "GPU"}
STEP = {
    "contender": "synco",
    "images_per_second": 800.0,
    "ms_of_each_round": [4.0, 4.0, 8.0],
    "device": "GPU",
    "date": "1",
}
FASTER = STEP | {"contender": "synco speed.recompute=true", "ms_of_each_round": [2.0, 5.0, 5.0]}
SLOWER = STEP | {"contender": "synco bn.mode=plain", "ms_of_each_round": [4.0, 5.0, 9.0]}
LOADED = {"contender": "synco_fast", "images_per_second": 4000.4, "augmentation": "compiled", "device": "GPU"}


@pytest.mark.parametrize(
    ("stage", "rows", "is_success", "expected"),
    [
        ("kernels", [MEASURED, MOCO], True, "cuda synco 0.5 ms, 0.5 of MoCo's"),
        ("kernels", [ABSENT, MOCO], False, "cuda was not timed: no nvcc"),
        ("kernels", [MEASURED, MOCO | {"device": "CPU"}], False, "a row is of CPU, not of GPU"),
        ("kernels", [], False, "no rows"),
        ("step", [STEP, STEP | {"contender": "moco_eager", "date": "2"}], True, "synco 800 images/s"),
        (
            "ablation",
            [STEP, SLOWER, FASTER],
            True,
            "fastest of 2 changes: speed.recompute=true, 1.60 of synco's images/s",
        ),
        ("ablation", [STEP, FASTER | {"date": "2"}], False, "no change was timed"),
        ("ablation", [FASTER], False, "synco was not timed: it has no row"),
        ("loader", [LOADED | {"contender": "torchvision"}], False, "synco_fast was not timed: it has no row"),
        ("loader", [LOADED], True, "synco_fast 4000 images/s"),
        ("loader", [LOADED | {"augmentation": "plain"}], False, "plain torch made the views"),
        ("loader", [{"contender": "synco_fast", "images_per_second": 4000.4}], False, "a row is of None, not of GPU"),
        (
            "step",
            [{"contender": "synco", "skipped": "out of memory", "device": "GPU"}],
            False,
            "synco was not timed: out of memory",
        ),
    ],
)
def test_headlines_from_rows(
    stage: str, rows: list[dict[str, Any]], is_success: bool, expected: str, tmp_path: Path
) -> None:
    """On a GPU, rows of anything else are no success."""
    (tmp_path / f"{stage}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"half a row')
    assert said(stage, tmp_path) == (is_success, expected)


PYTEST = "SKIPPED [1] tests/ops/test_triton.py:43: {}\n===== 310 passed, 1 skipped in 61.20s (0:01:01) =====\n"
TOOLS = "========= ERROR SUMMARY: {} errors\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
DOCTOR = "  GPU 0  GPU, sm_90, 79 GiB\n  cpu   ok\n  triton  ok\n  cuda  {}\n  compiled, cuda  DALI is missing\n"


@pytest.mark.parametrize(
    ("stage", "log", "expected"),
    [
        ("build", DOCTOR.format("ok"), "cuda and triton ok; not augmentation on cuda"),
        ("build", DOCTOR.format("compiled without nvcc"), "cuda: compiled without nvcc"),
        (
            "tests",
            "passed: 0 failures\n" + PYTEST.format("run in this process") + "== 2 failed, 5 passed in 2.00s ==",
            "315 passed, 2 failed, 1 skipped; 1 of 2 self-tests on the hardware",
        ),
        ("tests", PYTEST.format("no CUDA device"), "tests were skipped for want of a GPU"),
        ("tests", "collected 0 items\n", "no test passed"),
        ("sanitizer", TOOLS.format(3) + "== 6 passed in 2s ==\n", "memcheck 3, racecheck 0 findings; 6 passed"),
        ("sanitizer", "========= ERROR SUMMARY: 0 errors\n", "racecheck did not come to an end"),
    ],
)
def test_headlines_from_logs(stage: str, log: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / f"{stage}.log").write_text(log)
    assert said(stage, tmp_path)[1] == expected


def said(stage: str, folder: Path) -> tuple[bool, str]:
    try:
        return True, headline(stage, folder, "cuda", "GPU")
    except Hollow as error:
        return False, str(error)
