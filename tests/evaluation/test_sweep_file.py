"""What a sweep's file means, and which are refused before anything starts."""

from pathlib import Path
from typing import Any

import pytest

from synco_fast import config
from synco_fast.cli_evaluation import evaluations
from synco_fast.evaluation.sweep import read_plan
from synco_fast.ops import KINDS
from tests.command import call, check_error
from tests.conftest import REPOSITORY
from tests.evaluation.sweeps import write_sweep


def test_a_grid_is_every_combination(tiny: Path, tmp_path: Path) -> None:
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
    expected = config.load(tiny, ["loss.temperature=0.1", "optim.milestones=[1, 2]", "data.recipe=moco_v2", "seed=7"])
    assert run.config == expected
    assert run.overrides == {key: values[-1] if key == "data.recipe" else values[0] for key, values in grid.items()}


def test_overrides_are_those_of_set(tiny: Path, tmp_path: Path) -> None:
    """A key changes one value, a section all of them; and no run changes another's."""
    runs = {
        "one": {"negatives.mixed": 0, "method": "synco"},
        "section": {"method": "moco", "negatives": {}},
        "base": {},
    }
    plan = read_plan(write_sweep(tmp_path / "s.yaml", runs=runs), {})
    loads = [["negatives.mixed=0"], ["method=moco", "negatives={}"], []]
    assert [run.config for run in plan.runs] == [config.load(tiny, overrides) for overrides in loads]


def test_options_become_words() -> None:
    """Lists are repeated where the option is, and joined where it takes them so; what trains goes on where it was."""
    commands = evaluations()
    overrides = ["data.image_size=32", "data.threads=1"]
    knn = {"k": [20, 200], "temperature": 0.07, "device": "cpu", "set": overrides}
    words = ["--k", "20,200", "--temperature", "0.07", "--device", "cpu", "--set", overrides[0], "--set", overrides[1]]
    assert commands["knn"].words(knn) == words
    assert commands["linear"].words({"cached": True, "set": "data.threads=1"}) == [
        "--cached",
        "--set",
        "data.threads=1",
    ]
    resumed = ["--resume", "auto"]
    assert commands["linear"].words({"lr": 1e-5, "milestones": 9}) == ["--lr", "1e-05", "--milestones", "9", *resumed]
    assert commands["semisup"].words({"fraction": 1, "lr-head": [1, 2]})[2:] == ["--lr-head", "1,2", *resumed]


@pytest.mark.parametrize("name", ["cifar10_methods", "kinds"])
def test_shipped_sweeps(name: str) -> None:
    plan = read_plan(REPOSITORY / "configs" / "sweeps" / f"{name}.yaml", evaluations())
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
    "pretrain": ({"evaluate": {"pretrain": {}}}, ("evaluate.pretrain: names a folder",)),
    "a folder of pretraining": ({"evaluate": {"tensorboard": {"command": "knn"}}}, ("evaluate.tensorboard: names",)),
    "a folder elsewhere": ({"evaluate": {"../knn": {"command": "knn"}}}, ("evaluate.../knn: names a folder",)),
    "unknown command": ({"evaluate": {"a": {"command": "fit"}}}, ("evaluate.a.command = 'fit': no such", "are knn")),
    "a command of a number": ({"evaluate": {"a": {"command": 3}}}, ("evaluate.a.command = 3: no such evaluation",)),
    "options of a named one": ({"evaluate": {"a": {"command": "knn", "k": 0}}}, ("evaluate.a.k: --k 0: expected",)),
    "unknown option": ({"evaluate": {"knn": {"temprature": 1}}}, ("--temprature", "did you mean temperature?")),
    "an option of the sweep": ({"evaluate": {"knn": {"output": "x"}}}, ("knn has no option --output for a sweep",)),
    "resuming": ({"evaluate": {"linear": {"resume": "auto"}}}, ("linear has no option --resume for a sweep",)),
    "values of options": (
        {"evaluate": {"knn": {"k": "banana", "device": "tpu"}, "linear": {"epochs": -3}, "semisup": {}}},
        (
            "evaluate.knn.k: --k banana: expected whole numbers",
            "evaluate.knn.device = 'tpu': ",
            "evaluate.linear.epochs = -3: ",
            "evaluate.semisup: Missing option '--fraction'",
        ),
    ),
    "values that only the command knows": (
        {"evaluate": {"linear": {"lr": -3}, "semisup": {"fraction": 1, "lr-head": [0.5, 0]}}},
        ("evaluate.linear: --lr -3: expected", "evaluate.semisup.lr-head: --lr-head 0.5,0: expected"),
    ),
    "options that do not go together": (
        {"evaluate": {"linear": {"epochs": 60, "milestones": [30, 60]}, "semisup": {"fraction": 0.2}}},
        ("evaluate.linear: --milestones 30,60: must", "evaluate.semisup: --fraction 0.2: a number of epochs"),
    ),
    "training what is cached": (
        {"evaluate": {"linear": {"cached": True, "epochs": 3}}},
        ("evaluate.linear: --cached and --epochs",),
    ),
    "images prepared otherwise": (
        {"evaluate": {"knn": {"set": ["data.threads=2", "data.eval_resize=8"]}}},
        ("a: evaluate.knn.set: --set", "data.eval_resize = 8"),
    ),
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
def test_bad_sweeps(kind: str, tiny: Path, images: Path, tmp_path: Path) -> None:
    """Refused before anything is written or started."""
    changes, names = BAD[kind]
    settings = {"runs": {"a": {}}} | changes
    file = write_sweep(tmp_path / "s.yaml", **{key: value for key, value in settings.items() if value is not None})
    done = call("sweep", file, "--data", images, "--output", tmp_path / "out")
    check_error(done.code, done.err, names)
    assert done.code == 1 and not (tmp_path / "out").exists()
