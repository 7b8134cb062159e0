"""Sweeps: real processes that are stopped, killed and fail, against the commands one by one."""

import fcntl
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from synco_fast.engine import checkpoints
from synco_fast.evaluation import sweep_run
from synco_fast.evaluation.sweep_state import alone
from tests.command import call, check_error, check_refused_there, contents
from tests.conftest import SYNCO_FAST, environment
from tests.engine.runs import differences, final_state, rows
from tests.evaluation.probes import result_of
from tests.evaluation.sweeps import write_sweep
from tests.page import check_self_contained, read


def results(output: Path) -> Any:
    return json.loads((output / "result.json").read_text())


def stages(output: Path) -> dict[str, dict[str, Any]]:
    """The finished stages of each run's folder."""
    return {str(path.parent): json.loads(path.read_text()) for path in output.glob("*/seed-*/stages.json")}


def finished(output: Path) -> int:
    return sum(map(len, stages(output).values()))


class Sweep:
    """A sweep in a process of its own, whose messages go to a file that the next one goes on with."""

    def __init__(self, file: Path, images: Path, output: Path, *options: str) -> None:
        self.output, self.said = output, output.with_suffix(".said")
        command = [*SYNCO_FAST, "sweep", str(file), "--data", str(images), "--output", str(output), *options]
        with self.said.open("a") as said:
            self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said, env=environment())

    def wait_for(self, pattern: str, path: Path) -> None:
        """Until a file has it."""
        while self.process.poll() is None and not (path.exists() and re.search(pattern, path.read_text())):
            time.sleep(0.02)
        assert self.process.poll() is None, self.said.read_text()

    def wait_for_stages(self, count: int) -> None:
        while self.process.poll() is None and finished(self.output) < count:
            time.sleep(0.02)
        assert self.process.poll() is None, self.said.read_text()

    def kill(self) -> None:
        self.process.kill()
        assert self.process.wait() == -signal.SIGKILL

    def end(self) -> str:
        """Everything said by it and those before."""
        assert self.process.wait() == 0, self.said.read_text()
        return self.said.read_text()


def wait_for_children(output: Path) -> None:
    """Until none is left of a sweep that was killed."""
    with (output / "children.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)


def done_in(said: str) -> list[str]:
    return re.findall(r"^(.+) is done in \d+ s$", said, re.MULTILINE)


def by_hand(config: Path, images: Path, output: Path, run: str, seed: int, overrides: dict[str, Any], k: str) -> Any:
    """A row of the results, made by the commands one by one in this process."""
    options = [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
    settings = [f"output={output}", f"data.root={images}", f"seed={seed}", *options]
    assert call("pretrain", config, *(word for setting in settings for word in ("--set", setting))).code == 0
    checkpoint, folder = output / "checkpoints" / "latest.pt", output / "knn"
    assert call("knn", checkpoint, "--data", images, "--k", k, "--temperature", "0.2", "--output", folder).code == 0
    metrics = {"knn.accuracy": json.loads((folder / "result.json").read_text())["metrics"]["accuracy"]}
    return {"run": run, "seed": seed, "overrides": overrides, "metrics": metrics}


def check_same(a: Path, b: Path) -> None:
    """Two runs end in the same bits, by the same way."""
    assert differences(final_state(a), final_state(b)) == []
    assert rows(a) == rows(b)


def fingerprint(output: Path) -> dict[str, tuple[int, int]]:
    """What was written by each finished stage, and when."""
    names = {"pretrain": "checkpoints/latest.pt", "knn": "knn/result.json"}
    files = [Path(folder) / names[stage] for folder, found in stages(output).items() for stage in found]
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def test_stopped_killed_and_gone_on(tiny: Path, images: Path, tmp_path: Path) -> None:
    """Three runs: SIGTERM while the longest trains, SIGKILL in a later one. What was finished stays as it was, and the
    results are those of the commands one by one.
    """
    overrides: dict[str, dict[str, Any]] = {
        "start": {"trainer.max_steps": 0},
        "long": {"trainer.max_steps": 60, "trainer.epochs": 10},
        "lr=0.1": {"trainer.max_steps": 2, "optim": {"lr": 0.1}},
    }
    file = write_sweep(tmp_path / "s.yaml", runs=overrides, evaluate={"knn": {"k": [7, 20], "temperature": 0.2}})
    output = tmp_path / "out"
    long, last = output / "long" / "seed-0", output / "lr=0.1" / "seed-0"

    sweep = Sweep(file, images, output)
    sweep.wait_for("\nstep 2/60 ", long / "log.txt")
    sweep.process.send_signal(signal.SIGTERM)
    assert sweep.process.wait() == 75
    assert "stopped by a signal: 2 of 6 stages are done; the same command goes on" in sweep.said.read_text()
    assert 2 <= final_state(long)["step"] < 60
    before = fingerprint(output)
    assert len(before) == 2

    sweep = Sweep(file, images, output)
    sweep.wait_for("synco-fast pretrain", last / "log.txt")
    sweep.kill()
    wait_for_children(output)
    assert finished(output) == 4
    # The kernel stopped its process, which had hardly begun.
    assert not (last / "checkpoints" / "latest.pt").exists()
    before |= fingerprint(output)

    last_of_three = call("sweep", file, "--data", images, "--output", output)
    assert last_of_three.code == 0, last_of_three.err
    said = sweep.said.read_text() + last_of_three.err
    after = fingerprint(output)
    assert {path: after[path] for path in before} == before
    done = ["start, seed 0: pretrain", "start, seed 0: knn", "long, seed 0: pretrain", "long, seed 0: knn"]
    assert done_in(said) == [*done, "lr=0.1, seed 0: pretrain", "lr=0.1, seed 0: knn"]
    assert (long / "log.txt").read_text().count("synco-fast pretrain") == 2

    expected = []
    for name, changes in overrides.items():
        expected.append(by_hand(tiny, images, tmp_path / "alone" / name, name, 0, changes, "7,20"))
        check_same(output / name / "seed-0", tmp_path / "alone" / name)
    result = results(output)
    assert result["rows"] == expected
    assert (result["command"], result["metrics"], result["stages"]) == ("sweep", {}, {"done": 6, "of": 6})
    check_self_contained(output / "report.html")

    check_changes_of_the_file(file, images, output)
    check_changes_of_the_images(file, images, output, tmp_path / "images")


def check_changes_of_the_file(file: Path, images: Path, output: Path) -> None:
    """What was finished with other settings is refused by run and key; a run taken out leaves the table alone."""
    settings = yaml.safe_load(file.read_text())
    before = contents(output)

    def refused(names: tuple[str, ...], **changes: Any) -> None:
        done = call("sweep", write_sweep(file, **settings | changes), "--data", images, "--output", output)
        check_error(done.code, done.err, (str(output), *names))
        assert contents(output).keys() == before.keys() and stages(output) == finished_before

    finished_before = stages(output)
    other = {**settings["runs"], "long": {"trainer.max_steps": 21, "loss.temperature": 0.3}}
    refused(("long, seed 0: trainer.max_steps is 21, was 60", "loss.temperature is 0.3, was 0.2"), runs=other)
    refused(("start, seed 0: knn.k is 9, was [7, 20]",), evaluate={"knn": {"k": 9, "temperature": 0.2}})
    refused(("start, seed 0: knn.temperature is 'not given', was 0.2",), evaluate={"knn": {"k": [7, 20]}})

    fewer = {name: settings["runs"][name] for name in ("long", "lr=0.1")}
    done = call(
        "sweep", write_sweep(file, **settings | {"runs": fewer}), "--data", images, "--output", output, "--jobs", "2"
    )
    assert done.code == 0, done.err
    assert done.out == (output / "table.md").read_text()
    assert [line.split()[1] for line in done.out.splitlines()[2:]] == ["long", "lr=0.1"]
    assert "begins" not in done.err and stages(output) == finished_before


def check_changes_of_the_images(file: Path, images: Path, output: Path, other: Path) -> None:
    """Other held-out images alone are refused where an evaluation is finished."""
    shutil.copytree(images, other)
    (other / "val" / "class0" / "000.jpg").unlink()
    before = stages(output)
    done = call("sweep", file, "--data", other, "--output", output)
    names = ("long, seed 0: knn: held-out data.images is 19, was 20", "held-out data.digest is", "or images")
    check_error(done.code, done.err, names)
    assert ": data.images" not in done.err and stages(output) == before


def test_stopped_in_an_evaluation_that_trains(tiny: Path, images: Path, tmp_path: Path) -> None:
    """SIGTERM within a linear probe, under a name of its own, which goes on from its checkpoint: the result and bits of
    one left alone."""
    options = {"epochs": 12, "batch-size": 16, "lr": 0.1}
    runs = {"a": {"trainer.max_steps": 0}}
    file, output = (
        write_sweep(tmp_path / "s.yaml", runs=runs, evaluate={"probe": {"command": "linear", **options}}),
        tmp_path / "out",
    )
    folder = output / "a" / "seed-0"
    sweep = Sweep(file, images, output)
    sweep.wait_for("\nstep 12/72 ", folder / "log.txt")
    sweep.process.send_signal(signal.SIGTERM)
    assert sweep.process.wait() == 75, sweep.said.read_text()
    assert "1 of 2 stages are done" in sweep.said.read_text()
    assert 12 <= checkpoints.read(folder / "probe" / "checkpoints" / "latest.pt")["step"] < 72
    done = call("sweep", file, "--data", images, "--output", output)
    assert done.code == 0 and done_in(done.err) == ["a, seed 0: probe"], done.err
    said = (folder / "log.txt").read_text()
    assert said.count("synco-fast linear") == 2 and said.count("step 6/72 epoch 1: top-1") == 1

    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    checkpoint, alone = folder / "checkpoints" / "latest.pt", tmp_path / "alone"
    assert call("linear", checkpoint, "--data", images, "--output", alone, *words).code == 0
    assert result_of(folder / "probe") == result_of(alone) and rows(folder / "probe") == rows(alone)
    assert (folder / "probe" / "head.safetensors").read_bytes() == (alone / "head.safetensors").read_bytes()
    assert results(output)["rows"][0]["metrics"]["probe.top1"] == result_of(alone)["metrics"]["top1"]


def test_names_that_are_not_utf8(tiny: Path, images: Path, tmp_path: Path) -> None:
    """They stand in the command that the page shows, which is UTF-8 all the same; the result has them as they are."""
    data, name = tmp_path / os.fsdecode(b"caf\xe9"), tmp_path / os.fsdecode(b"s\xe9")
    shutil.copytree(images, data)
    runs = {"a": {"trainer.max_steps": 0}}
    file, output = write_sweep(name.with_suffix(".yaml"), runs=runs, evaluate={"knn": {}}), tmp_path / "out"
    done = call("sweep", file, "--data", data, "--output", output)
    assert done.code == 0, done.err
    check_self_contained(output / "report.html")
    text = read(output / "report.html").text
    assert "/caf?" in text and "Sweep s?" in text
    assert str(data) in results(output)["about"]["command"] and results(output)["stages"] == {"done": 2, "of": 2}

    checkpoint = output / "a" / "seed-0" / "checkpoints" / "latest.pt"
    for words in (("sweep", file), ("linear", checkpoint, "--batch-size", "50")):
        done = call(*words, "--data", data, "--output", name)
        check_error(done.code, done.err, (str(name), "names in UTF-8 only"))
        assert not (name / "metrics.jsonl").exists()


def test_a_run_that_fails(tiny: Path, images: Path, tmp_path: Path) -> None:
    """There are too few images for its batch, which its process finds out; the other is finished, and stays so."""
    runs: dict[str, Any] = {"large": {"data.batch_size": 128, "queue.size": 128}, "start": {"trainer.max_steps": 0}}
    file, output = write_sweep(tmp_path / "s.yaml", runs=runs), tmp_path / "out"
    done = call("sweep", file, "--data", images, "--output", output, "--jobs", "2")
    check_error(done.code, done.err, ("1 of 2 runs failed", "large, seed 0: pretrain failed: exit code 1"))
    log = output / "large" / "seed-0" / "log.txt"
    assert f"large, seed 0: pretrain ({log})" in done.err
    assert done.err.count("100 images") == 1 and "100 images" in log.read_text()
    assert [row["run"] for row in results(output)["rows"]] == ["start"]
    assert done_in(done.err) == ["start, seed 0: pretrain"]

    runs["large"] = {"trainer.max_steps": 0}
    done = call("sweep", write_sweep(file, runs=runs), "--data", images, "--output", output)
    assert done.code == 0, done.err
    assert done_in(done.err) == ["large, seed 0: pretrain"]
    assert [row["run"] for row in results(output)["rows"]] == ["large", "start"]


def test_one_sweep_at_a_time(tiny: Path, images: Path, tmp_path: Path) -> None:
    file, output = write_sweep(tmp_path / "s.yaml", runs={"a": {}}), tmp_path / "out"
    output.mkdir()
    with (output / "sweep.lock").open("w") as lock:
        lock.write("4321\n")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = contents(output)
        done = call("sweep", file, "--data", images, "--output", output)
        check_error(done.code, done.err, (str(output), "another sweep is at work there, process 4321"))
        assert contents(output) == before


def test_children_of_a_killed_sweep_are_waited_for(tmp_path: Path) -> None:
    """The lock is held by who inherited it, until it ends, and not by the sweep alone."""
    said: list[str] = []
    with alone(tmp_path, said.append) as lock:
        before, child = time.monotonic(), subprocess.Popen(["sleep", "1"], pass_fds=[lock])
    with alone(tmp_path, said.append):
        assert time.monotonic() - before >= 1
    assert child.wait() == 0
    assert said == [f"waiting for what a sweep that was killed left running in {tmp_path}"]
    with alone(tmp_path, said.append):
        assert len(said) == 1


def test_bad_places(tiny: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_sweep(tmp_path / "s.yaml", runs={"a": {}}, evaluate={"knn": {}})
    check_refused_there(
        tmp_path / "out", "sweep", file, "--data", images, "--output", tmp_path / "out", names=("notes.txt", "no sweep")
    )
    for where, names in ((tmp_path / "gone", ("gone", "does not exist")), (images / "train", ("sweep needs", "val/"))):
        done = call("sweep", file, "--data", where, "--output", tmp_path / "new")
        check_error(done.code, done.err, names)
    done = call("sweep", tmp_path / "gone.yaml", "--data", images, "--output", tmp_path / "new")
    check_error(done.code, done.err, ("gone.yaml", "No such file"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = call("sweep", file, "--data", images, "--output", tmp_path / "new")
    check_error(done.code, done.err, ("torchrun",))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("text", ["", "[]", '{"pretrain": 3}', '{"pretrain": {"seconds": 1}}'])
def test_damaged_records(text: str, tiny: Path, images: Path, tmp_path: Path) -> None:
    file, folder = write_sweep(tmp_path / "s.yaml", runs={"a": {}}), tmp_path / "out" / "a" / "seed-0"
    folder.mkdir(parents=True)
    (folder / "stages.json").write_text(text)
    done = call("sweep", file, "--data", images, "--output", tmp_path / "out")
    check_error(done.code, done.err, (str(folder / "stages.json"), "not what a sweep wrote", "delete the folder"))


def test_each_job_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert sweep_run.devices() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-3")
    assert sweep_run.devices() == ["5", "GPU-3"]


@pytest.mark.slow
@pytest.mark.timeout(350)
def test_twelve_runs_killed_in_the_middle(tiny: Path, images: Path, tmp_path: Path) -> None:
    """SIGKILL at a random moment after the fifth stage, two runs at a time."""
    grid = {"loss.temperature": [0.1, 0.2], "negatives.mixed": [0, 4]}
    settings = {"seeds": [0, 1, 2], "grid": grid, "evaluate": {"knn": {"k": 7, "temperature": 0.2}}}
    file, output = write_sweep(tmp_path / "s.yaml", **settings), tmp_path / "out"
    sweep = Sweep(file, images, output, "--jobs", "2")
    sweep.wait_for_stages(5)
    time.sleep(random.uniform(0, 12))
    sweep.kill()
    wait_for_children(output)
    before = fingerprint(output)
    assert 5 <= len(before) < 24
    said = Sweep(file, images, output, "--jobs", "2").end()
    after = fingerprint(output)
    assert len(after) == 24 and {path: after[path] for path in before} == before
    # A stage that had ended when the sweep was killed, and was not yet written down, may be said to be done never.
    assert len(set(done_in(said))) == len(done_in(said)) >= 22
    found = results(output)["rows"]
    assert len(found) == 12
    for row in found:
        alone = tmp_path / "alone" / row["run"] / str(row["seed"])
        assert row == by_hand(tiny, images, alone, row["run"], row["seed"], row["overrides"], "7")
        check_same(output / row["run"] / f"seed-{row['seed']}", alone)
