"""Sweeps: what a file means, and real processes that are stopped, killed and fail, against the commands one by one."""

import fcntl
import json
import random
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from synco_fast import config
from synco_fast.evaluation import sweep_page, sweep_run
from synco_fast.evaluation.sweep import Flags, arguments, read_plan
from synco_fast.evaluation.sweep_state import alone
from synco_fast.ops import KINDS
from tests.command import call, check_error, check_refused_there, contents
from tests.conftest import REPOSITORY, SYNCO_FAST, TINY, environment
from tests.engine.runs import differences, final_state, rows
from tests.page import check_self_contained, read

COMMANDS: dict[str, Flags] = {
    "knn": {"k": False, "temperature": False},
    "linear": {"cached": True, "epochs": False},
}
HOSTILE = """"'></pre></title></style><script>alert(1)</script><img src=x onerror=alert(2)>&amp;$title ${x}|"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A base configuration of a twentieth of a second a step."""
    path = tmp_path / "small.yaml"
    path.write_text(TINY.replace("arch: resnet18", "arch: resnet10_narrow"))
    return path


def write_sweep(path: Path, **settings: Any) -> Path:
    path.write_text(yaml.safe_dump({"config": "small.yaml", "seeds": [0], **settings}, sort_keys=False))
    return path


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


def test_stopped_killed_and_gone_on(small: Path, images: Path, tmp_path: Path) -> None:
    """Three runs: SIGTERM while the longest trains, SIGKILL in a later one. What was finished stays as it was, and the
    results are those of the commands one by one.
    """
    overrides: dict[str, dict[str, Any]] = {
        "start": {"trainer.max_steps": 0},
        "long": {"trainer.max_steps": 20},
        "lr=0.1": {"trainer.max_steps": 2, "optim": {"lr": 0.1}},
    }
    file = write_sweep(tmp_path / "s.yaml", runs=overrides, evaluate={"knn": {"k": [7, 20], "temperature": 0.2}})
    output = tmp_path / "out"
    long, last = output / "long" / "seed-0", output / "lr=0.1" / "seed-0"

    sweep = Sweep(file, images, output)
    sweep.wait_for("\nstep 2/20 ", long / "log.txt")
    sweep.process.send_signal(signal.SIGTERM)
    assert sweep.process.wait() == 75
    assert "stopped by a signal: 2 of 6 stages are done; the same command goes on" in sweep.said.read_text()
    assert 2 <= final_state(long)["step"] < 20
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
        expected.append(by_hand(small, images, tmp_path / "alone" / name, name, 0, changes, "7,20"))
        check_same(output / name / "seed-0", tmp_path / "alone" / name)
    result = results(output)
    assert result["rows"] == expected
    assert (result["command"], result["metrics"], result["stages"]) == ("sweep", {}, {"done": 6, "of": 6})
    check_self_contained(output / "report.html")

    check_changes_of_the_file(file, images, output)


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
    refused(("long, seed 0: trainer.max_steps is 21, was 20", "loss.temperature is 0.3, was 0.2"), runs=other)
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


def test_a_run_that_fails(small: Path, images: Path, tmp_path: Path) -> None:
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


def test_one_sweep_at_a_time(small: Path, images: Path, tmp_path: Path) -> None:
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


def test_a_grid_is_every_combination(small: Path, tmp_path: Path) -> None:
    grid: dict[str, list[Any]] = {
        "loss.temperature": [0.1, 1],
        "optim.milestones": [[1, 2]],
        "data.recipe": ["moco_v1", "moco_v2"],
        "optim.clip_norm": [None],
    }
    plan = read_plan(write_sweep(tmp_path / "s.yaml", seeds=[7, 3], grid=grid), {})
    rest = "optim.milestones=1,2 data.recipe=moco_v{} optim.clip_norm=null"
    names = [f"loss.temperature={t} {rest.format(version)}" for t in ("0.1", "1") for version in (1, 2)]
    assert [(run.name, run.seed) for run in plan.runs] == [(name, seed) for name in names for seed in (7, 3)]
    run = plan.runs[2]
    expected = config.load(small, ["loss.temperature=0.1", "optim.milestones=[1, 2]", "data.recipe=moco_v2", "seed=7"])
    assert run.config == expected
    assert run.overrides == {key: values[-1] if key == "data.recipe" else values[0] for key, values in grid.items()}


def test_overrides_are_those_of_set(small: Path, tmp_path: Path) -> None:
    """A key changes one value, a section all of them; and no run changes another's."""
    runs = {
        "one": {"negatives.mixed": 0, "method": "synco"},
        "section": {"method": "moco", "negatives": {}},
        "base": {},
    }
    plan = read_plan(write_sweep(tmp_path / "s.yaml", runs=runs), {})
    loads = [["negatives.mixed=0"], ["method=moco", "negatives={}"], []]
    assert [run.config for run in plan.runs] == [config.load(small, overrides) for overrides in loads]


def test_options_become_words() -> None:
    options = {"k": [20, 200], "temperature": 0.07, "cached": True, "device": "cpu", "lr": [1e-5, 10]}
    words = ["--k", "20,200", "--temperature", "0.07", "--cached", "--device", "cpu", "--lr", "1e-05,10"]
    assert arguments(options) == words


@pytest.mark.parametrize("name", ["cifar10_methods", "kinds"])
def test_shipped_sweeps(name: str) -> None:
    plan = read_plan(REPOSITORY / "configs" / "sweeps" / f"{name}.yaml", COMMANDS)
    configs = {run.name: run.config for run in plan.runs}
    kinds = {name: {kind for kind in KINDS if getattr(run.negatives, kind)} for name, run in configs.items()}
    assert plan.stages == ["pretrain", "knn", "linear"]
    if name == "kinds":
        alone, without = {kind: {kind} for kind in KINDS}, {f"no {kind}": set(KINDS) - {kind} for kind in KINDS}
        assert kinds == {"all": set(KINDS), "none": set(), **alone, **without}
        return
    assert len(plan.runs) == 12
    every = set(KINDS)
    assert kinds == {"random": every, "moco": set(), "mochi": {"mixed", "interpolated"}, "synco": every}
    assert {name: run.method for name, run in configs.items()} == {name: name for name in kinds} | {"random": "synco"}
    assert [name for name, run in configs.items() if run.trainer.max_steps is not None] == ["random"]


BAD: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "no runs": ({"runs": None}, ("neither of runs and grid",)),
    "both": ({"grid": {"seed": [1]}}, ("both of runs and grid",)),
    "no base": ({"config": "gone.yaml"}, ("gone.yaml", "No such file")),
    "empty runs": ({"runs": {}}, ("runs: is empty",)),
    "empty grid": ({"runs": None, "grid": {}}, ("grid: is empty",)),
    "empty values": ({"runs": None, "grid": {"optim.lr": []}}, ("grid.optim.lr: is empty",)),
    "values twice": ({"runs": None, "grid": {"optim.lr": [1, 1]}}, ("two combinations", "optim.lr=1")),
    "unknown key": ({"seed": [1]}, ("seed = [1]: no such key", "did you mean seeds?")),
    "no seeds": ({"seeds": []}, ("seeds = []", "at least 1 item")),
    "seeds twice": ({"seeds": [0, 1, 0]}, ("seeds: 0 is given twice",)),
    "a seed below 0": ({"seeds": [-1]}, ("seeds.0 = -1",)),
    "a seed of text": ({"seeds": ["1"]}, ("seeds.0 = '1'",)),
    "a run of nothing": ({"runs": {"a": None}}, ("runs.a = None",)),
    "unknown evaluation": ({"evaluate": {"knm": {}}}, ("evaluate.knm: no such evaluation", "did you mean knn?")),
    "pretrain": ({"evaluate": {"pretrain": {}}}, ("evaluate.pretrain: no such evaluation", "there are knn")),
    "unknown option": ({"evaluate": {"knn": {"temprature": 1}}}, ("--temprature", "did you mean temperature?")),
    "an option of the sweep": ({"evaluate": {"knn": {"output": "x"}}}, ("knn has no option --output for a sweep",)),
    "a value for a value": ({"evaluate": {"knn": {"k": True}}}, ("evaluate.knn.k = True", "expected a number")),
    "not finite": ({"evaluate": {"knn": {"k": float("nan")}}}, ("evaluate.knn.k = nan", "expected a number")),
    "an empty list": ({"evaluate": {"knn": {"k": []}}}, ("evaluate.knn.k = []",)),
    "a name with a slash": ({"runs": {"../a": {}}}, ("run '../a'", "a folder's")),
    "a name of dots": ({"runs": {"..": {}}}, ("run '..'", "a folder's")),
    "a name too long": ({"runs": {"n" * 201: {}}}, ("at most 200",)),
    "the name of a file": ({"runs": {"result.json": {}}}, ("run 'result.json'", "choose another")),
    "seed of a run": ({"runs": {"a": {"seed": 3}}}, ("a: seed: is set by the sweep's seeds",)),
    "output of a run": ({"runs": {"a": {"output": "x"}}}, ("a: output: is set by the sweep's --output",)),
    "data of a run": ({"runs": {"a": {"data": {"root": "x"}}}}, ("a: data.root: is set by the sweep's --data",)),
    "a section of nothing": ({"runs": {"a": {"seed": {}}}}, ("a: seed: is set by the sweep's seeds",)),
    "below a value": ({"runs": {"a": {"seed.x": 1}}}, ("a: seed: is set by the sweep's seeds",)),
    "an empty key": ({"runs": {"a": {"optim.": 1}}}, ("a: 'optim.': expected a key",)),
    "refused by the schema": (
        {"runs": {"good": {}, "bad": {"optim.lr": -1, "loss.temprature": 1}, "worse": {"queue.size": 17}}},
        ("bad: optim.lr = -1", "bad: loss.temprature = 1: no such key", "worse: queue.size = 17: must be a multiple"),
    ),
    "not here": ({"runs": {"a": {"speed.cuda_graph": True}}}, ("a: speed.cuda_graph = true: needs a GPU",)),
    "more than a process": ({"runs": {"a": {"bn.mode": "shuffle"}}}, ("a: bn.mode = shuffle: needs 2",)),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_sweeps(kind: str, small: Path, images: Path, tmp_path: Path) -> None:
    """Refused before anything is written or started."""
    changes, names = BAD[kind]
    settings = {"runs": {"a": {}}} | changes
    file = write_sweep(tmp_path / "s.yaml", **{key: value for key, value in settings.items() if value is not None})
    done = call("sweep", file, "--data", images, "--output", tmp_path / "out")
    check_error(done.code, done.err, names)
    assert done.code == 1 and not (tmp_path / "out").exists()


def test_bad_places(small: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_damaged_records(text: str, small: Path, images: Path, tmp_path: Path) -> None:
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


def made_up(names: list[str], seeds: int, values: np.ndarray) -> list[dict[str, Any]]:
    return [
        {"run": name, "seed": seed, "overrides": {}, "metrics": {"knn.accuracy": float(values[i, seed])}}
        for i, name in enumerate(names)
        for seed in range(seeds)
    ]


def test_mean_and_deviation() -> None:
    """Against numpy; the bound is a few roundings of sums of numbers below 1."""
    values = np.random.default_rng(0).random((2, 5))
    found = made_up(["a", "b"], 5, values)
    found[0]["metrics"]["linear.top1"] = 0.25
    for i, row in enumerate(sweep_page.summary(found)):
        metric = row["metrics"]["knn.accuracy"]
        assert metric["n"] == 5
        assert abs(metric["mean"] - values[i].mean()) < 1e-15
        assert abs(metric["deviation"] - values[i].std(ddof=1)) < 1e-15
    assert sweep_page.summary(found)[0]["metrics"]["linear.top1"] == {"mean": 0.25, "deviation": None, "n": 1}


def test_table_and_page(tmp_path: Path) -> None:
    """Hostile names too, that no sweep would take."""
    found = made_up(["a", HOSTILE], 2, np.array([[0.5, 0.51], [0.125, 0.125]]))
    found[0]["metrics"]["linear.top1"] = 0.25
    about = {"command": HOSTILE, "started": HOSTILE, "torch": HOSTILE}
    result = {"rows": found, "summary": sweep_page.summary(found), "settings": {"runs": {HOSTILE: {}}}}
    result |= {"about": about, "stages": {"done": 3, "of": 4}}
    table = sweep_page.table(result).splitlines()
    assert table[:3] == [
        "| run | knn.accuracy | linear.top1 |",
        "| --- | --- | --- |",
        "| a | 50.50 ± 0.71 (2) | 25.00 (1) |",
    ]
    assert table[3].endswith("&#124; | 12.50 ± 0.00 (2) | - |")
    (tmp_path / "report.html").write_text(sweep_page.page(result, HOSTILE), encoding="utf-8")
    check_self_contained(tmp_path / "report.html")
    page = read(tmp_path / "report.html")
    assert page.text.count(HOSTILE) >= 6 and "50.50 ± 0.71 (2)" in page.text and "3 of 4" in page.text
    labels = [value for tag, name, value in page.attributes if (tag, name) == ("svg", "aria-label")]
    assert labels == ["knn.accuracy of each run, by seed", "linear.top1 of each run, by seed"]
    assert sweep_page.page(result, HOSTILE) == (tmp_path / "report.html").read_text(encoding="utf-8")


def test_dots_stand_where_their_numbers_are() -> None:
    """A run's mean lies between its dots, in the same row."""
    found = made_up(["a", "b"], 2, np.array([[0.2, 0.4], [0.6, 0.6]]))
    svg = sweep_page.dots({"rows": found, "summary": sweep_page.summary(found)}, "knn.accuracy")
    groups = re.findall(r'<g id="PathCollection_\d">(.*?)\n   </g>', svg, re.DOTALL)
    means, seeds = (
        [(float(x), float(y)) for x, y in re.findall(r'<use [^>]*x="(.+?)" y="(.+?)"', g)] for g in groups[:2]
    )
    assert len(means) == 2 and len(seeds) == 4
    # Numbers are written with 6 decimals.
    assert means[0] == pytest.approx(np.mean(seeds[:2], axis=0), abs=1e-5)
    assert means[1] == pytest.approx(seeds[2], abs=1e-5) and seeds[2] == seeds[3]
    assert seeds[0][0] < seeds[1][0] < seeds[2][0]
    assert seeds[0][1] == seeds[1][1] < seeds[2][1]


@pytest.mark.slow
@pytest.mark.timeout(350)
def test_twelve_runs_killed_in_the_middle(small: Path, images: Path, tmp_path: Path) -> None:
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
        assert row == by_hand(small, images, alone, row["run"], row["seed"], row["overrides"], "7")
        check_same(output / row["run"] / f"seed-{row['seed']}", alone)
