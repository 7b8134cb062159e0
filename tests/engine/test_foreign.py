"""Pretraining that MoCo or SynCo began goes on as our own run would that has the same state."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from synco_fast import config as configuration
from synco_fast.config import Config
from synco_fast.engine import checkpoints, foreign
from synco_fast.errors import UserError
from tests import others
from tests.command import Finished, call, check_error, contents
from tests.conftest import RESNET18
from tests.engine.runs import differences, rows

SETTINGS = ("data.batch_size=48", "queue.size=96")  # 2 steps an epoch


def pretrain(images: Path, config: Path, output: Path, *settings: str, resume: object = None) -> Finished:
    given = [f"output={output}", *SETTINGS, *settings]
    options = [part for setting in given for part in ("--set", setting)]
    return call("pretrain", config, "--data", images, *options, *([] if resume is None else ["--resume", str(resume)]))


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def begun(request: pytest.FixtureRequest, images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Our own checkpoint after one epoch of two steps; and the dtype of its queue."""
    folder = tmp_path_factory.mktemp("begun")
    (folder / "tiny.yaml").write_text(RESNET18)
    dtype = f"queue.dtype={request.param}"
    done = pretrain(images, folder / "tiny.yaml", folder / "run", dtype, "trainer.max_steps=2")
    assert done.code == 0, done.err
    return folder / "run" / "checkpoints" / "latest.pt", dtype


@pytest.fixture
def resnet18(tmp_path: Path) -> Path:
    """The configuration RESNET18 as a file."""
    path = tmp_path / "resnet18.yaml"
    path.write_text(RESNET18)
    return path


def as_moco(state: dict[str, Any], *, columns: bool, all_parameters: bool) -> dict[str, Any]:
    """Our state as MoCo would have written it, its parameters numbered as torchvision's network numbers them."""
    model, optimizer = state["model"], state["optimizer"]
    network = torchvision.models.resnet18()
    network.fc = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 16))
    theirs: dict[str, Tensor] = {}
    for encoder, name in (("query_encoder", "encoder_q"), ("key_encoder", "encoder_k")):
        for inner in network.state_dict():
            our = f"head.{inner.removeprefix('fc.')}" if inner.startswith("fc.") else f"backbone.{inner}"
            theirs[f"module.{name}.{inner}"] = model[f"{encoder}.{our}"].contiguous()
    queue = model["queue.rows"].float()
    theirs["module.queue"] = queue.T.contiguous() if columns else queue
    theirs["module.queue_ptr"] = model["queue.pointer"].reshape(1)
    count = len(list(network.parameters()))
    # MoCo's tensors do not lie channels last.
    momentum = {i: {"momentum_buffer": optimizer["state"][i]["momentum_buffer"].contiguous()} for i in range(count)}
    group = {"lr": 0.03, "momentum": 0.9, "params": list(range(2 * count if all_parameters else count))}
    return {
        "epoch": 1,
        "arch": "resnet18",
        "state_dict": theirs,
        "optimizer": {"state": momentum, "param_groups": [group]},
    }


@pytest.mark.parametrize("kind", ["MoCo", "SynCo"])
def test_going_on_is_as_from_our_own(
    kind: str, begun: tuple[Path, str], images: Path, resnet18: Path, tmp_path: Path
) -> None:
    """Two more steps, with synthetic negatives: weights, queue, momentum and metrics bit for bit."""
    ours, dtype = begun
    content = as_moco(checkpoints.load(ours), columns=kind == "MoCo", all_parameters=kind == "MoCo")
    theirs = tmp_path / "moco.pth.tar"
    torch.save(content, theirs, _use_new_zipfile_serialization=kind == "MoCo")
    states = {}
    for name, given in (("ours", ours), ("theirs", theirs)):
        done = pretrain(images, resnet18, tmp_path / name, dtype, "trainer.max_steps=4", resume=given)
        assert done.code == 0, done.err
        states[name] = checkpoints.load(tmp_path / name / "checkpoints" / "latest.pt")
        # The generators are a fresh run's, and nothing on a CPU draws from them.
        del states[name]["config"]["output"], states[name]["rng"]
    assert states["ours"]["step"] == 4
    assert differences(states["ours"], states["theirs"]) == []
    assert rows(tmp_path / "ours") == rows(tmp_path / "theirs") and len(rows(tmp_path / "theirs")) == 2
    started = checkpoints.load(ours)["model"]
    assert differences(started, states["theirs"]["model"]) != []
    assert f"{theirs}: going on after its epoch 1, as step 2 of this configuration" in done.err


def test_the_class_oracle_goes_on(begun: tuple[Path, str], images: Path, resnet18: Path, tmp_path: Path) -> None:
    """The rows that were theirs have no class, those that came since have theirs."""
    ours, dtype = begun
    theirs = tmp_path / "moco.pth.tar"
    torch.save(as_moco(checkpoints.load(ours), columns=True, all_parameters=True), theirs)
    settings = (dtype, "trainer.max_steps=3", "loss.class_oracle=true")
    done = pretrain(images, resnet18, tmp_path / "run", *settings, resume=theirs)
    assert done.code == 0, done.err
    labels = checkpoints.load(tmp_path / "run" / "checkpoints" / "latest.pt")["model"]["queue.labels"]
    assert (labels == -1).sum() == 48 and set(labels.tolist()) == {-1, 0, 1}
    assert f"{theirs}: no classes of its queue's rows in it" in done.err


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    query, key = (others.network("resnet18", "v2", seed) for seed in (0, 1))
    found = others.pretraining(query, key, torch.randn(16, 64))
    momentum = {i: {"momentum_buffer": torch.randn_like(value)} for i, value in enumerate(query.parameters())}
    found["optimizer"] = {"state": momentum, "param_groups": [{"params": list(range(2 * len(momentum)))}]}
    return found


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    file = tmp_path_factory.mktemp("config") / "tiny.yaml"
    file.write_text(RESNET18)
    return configuration.load(file, ["trainer.epochs=9"])


def changed(content: dict[str, Any], *removed: str, **tensors: Tensor | None) -> dict[str, Any]:
    """A copy without some entries, with tensors of `state_dict` replaced, or left out where None."""
    state = {**content["state_dict"], **{f"module.{name}": value for name, value in tensors.items()}}
    kept = {name: value for name, value in state.items() if value is not None}
    return {name: value for name, value in {**content, "state_dict": kept}.items() if name not in removed}


def optimizer(content: dict[str, Any], change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    copy = {"state": {i: dict(state) for i, state in content["optimizer"]["state"].items()}}
    copy["param_groups"] = [dict(group) for group in content["optimizer"]["param_groups"]]
    change(copy)
    return {**content, "optimizer": copy}


def test_momentum_follows_the_files_own_order(content: dict[str, Any], config: Config) -> None:
    """A model whose parameters come in another order has its optimizer number them so."""
    names = list(content["state_dict"])
    backwards = {name: content["state_dict"][name] for name in reversed(names)}
    states = content["optimizer"]["state"]
    last = 2 * len(states) - 1
    momentum = {last - i: state for i, state in states.items()}
    moved = {**content, "state_dict": backwards}
    moved["optimizer"] = {**content["optimizer"], "state": momentum}
    path = Path("given")
    straight, reverse = foreign.read(content, path, config), foreign.read(moved, path, config)
    assert straight.momentum.keys() >= {"backbone.conv1.weight", "head.0.weight", "head.2.bias"}
    assert torch.equal(straight.momentum["head.2.bias"], states[len(states) - 1]["momentum_buffer"])
    assert differences(straight.momentum, {name: reverse.momentum[name] for name in straight.momentum}) == []


@pytest.mark.parametrize("shape", [(64, 16), (16, 64)], ids=["rows", "columns"])
def test_rows_become_unit_rows_of_the_queues_dtype(
    shape: tuple[int, int], content: dict[str, Any], config: Config
) -> None:
    queue = torch.randn(shape)
    found = foreign.read(changed(content, queue=queue), Path("given"), config).model
    expected = nn.functional.normalize(queue if shape[0] == 64 else queue.T, dim=1)
    assert found["queue.rows"].dtype == torch.float16 and found["queue.pointer"] == 32
    assert (found["queue.rows"].float() - expected).abs().max() <= 2**-11  # rounding of entries below 1, twice over


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rounded_unit_rows_stay_as_they_are(dtype: torch.dtype, content: dict[str, Any]) -> None:
    queue = torch.nn.functional.normalize(torch.randn(64, 16), dim=1).to(dtype)
    exact = Config.model_validate({"model": {"arch": "resnet18", "dim": 16}, "queue": {"size": 64, "dtype": "fp32"}})
    found = foreign.read(changed(content, queue=queue), Path("given"), exact).model["queue.rows"]
    assert torch.equal(found, queue.float())


@pytest.mark.parametrize("unit", ["columns", "rows", "both"])
def test_a_square_queue_is_mocos_unless_only_its_rows_are_unit(unit: str, content: dict[str, Any]) -> None:
    queue = torch.nn.functional.normalize(torch.randn(16, 16), dim=0 if unit == "columns" else 1)
    if unit == "both":
        queue = torch.linalg.qr(torch.randn(16, 16))[0]
    square = Config.model_validate({"model": {"arch": "resnet18", "dim": 16}, "queue": {"size": 16, "dtype": "fp32"}})
    given = changed(content, queue=queue, queue_ptr=torch.tensor([0]))
    found = foreign.read(given, Path("given"), square).model["queue.rows"]
    torch.testing.assert_close(found, queue if unit == "rows" else queue.T, rtol=0, atol=1e-6)


def test_no_momentum_is_said(content: dict[str, Any], config: Config) -> None:
    for given in (changed(content, "optimizer"), optimizer(content, lambda state: state["state"].clear())):
        found = foreign.read(given, Path("given"), config)
        assert found.momentum == {} and "momentum starts from 0" in found.notes(Path("given"), 7)[1]
    assert len(foreign.read(content, Path("given"), config).notes(Path("given"), 7)) == 1
    lars = config.model_copy(update={"optim": config.optim.model_copy(update={"name": "lars"})})
    assert foreign.read(content, Path("given"), lars).momentum == {}


def test_a_queue_of_unknown_classes(content: dict[str, Any], config: Config) -> None:
    """For the class oracle, as the rows of a run's start; and it is said."""
    oracle = config.model_copy(update={"loss": config.loss.model_copy(update={"class_oracle": True})})
    found = foreign.read(content, Path("given"), oracle)
    assert found.model["queue.labels"].tolist() == [-1] * 64 and found.model["queue.labels"].dtype == torch.int64
    assert "no classes of its queue's rows" in found.notes(Path("given"), 7)[1]


NAN, ZERO_ROW = torch.full((16, 64), torch.nan), torch.ones(16, 64).index_fill_(1, torch.tensor([5]), 0.0)

REFUSED: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "no epoch": (lambda found: changed(found, "epoch"), "nor a pretraining checkpoint of MoCo.* lacks epoch"),
    "epoch as text": (lambda found: {**found, "epoch": "7"}, "lacks epoch, the number"),
    "no queue": (lambda found: changed(found, queue=None), "lacks module.queue"),
    "no pointer": (lambda found: changed(found, queue_ptr=None), "lacks module.queue_ptr"),
    "weights alone": (lambda found: {"state_dict": others.network("resnet18", "v2", 0).state_dict()}, "weights alone"),
    "nothing": (lambda found: {"state_dict": {}}, "not a checkpoint of synco-fast, .*no residual network"),
    "queue of another width": (lambda found: changed(found, queue=torch.ones(8, 64)), r"queue is \[8, 64\], expected"),
    "queue of one dimension": (lambda found: changed(found, queue=torch.ones(64)), r"queue is \[64\], expected"),
    "a row of zeros": (lambda found: changed(found, queue=ZERO_ROW), "1 rows of its queue are 0 .* row 5"),
    "rows of nan": (lambda found: changed(found, queue=NAN), "64 rows of its queue are 0 or not finite"),
    "pointer too far": (lambda found: changed(found, queue_ptr=torch.tensor([64])), "queue_ptr is 64, .* 0 to 63"),
    "endless pointer": (
        lambda found: changed(found, queue_ptr=torch.tensor([torch.inf])),
        "not what MoCo",
    ),
    "at its end already": (lambda found: {**found, "epoch": 9}, "completed 9 epochs, and trainer.epochs = 9"),
    "an endless epoch": (lambda found: {**found, "epoch": 10**30}, "nothing is left to train"),
    "tensors without names": (lambda found: {0: torch.zeros(3)}, "nor a pretraining checkpoint.*no residual network"),
    "numbers for names": (
        lambda found: {"state_dict": dict(enumerate(found["state_dict"].values()))},
        "no residual network",
    ),
    "text for tensors": (
        lambda found: {"state_dict": dict.fromkeys(found["state_dict"], "x")},
        "no residual network",
    ),
    "a state dict as list": (lambda found: {"state_dict": [torch.zeros(3)]}, "no residual network"),
    "a head without dimensions": (
        lambda found: changed(found, **{"encoder_k.fc.2.weight": torch.zeros(())}),
        r"last weight is \[\], expected 2",
    ),
    "an optimizer's states as list": (
        lambda found: optimizer(found, lambda state: state.update(state=list(range(128)))),
        "not what MoCo writes",
    ),
    "an optimizer's numbers beyond its states": (
        lambda found: optimizer(found, lambda state: state.update(state=[127])),
        "not what MoCo writes",
    ),
    "two pointers": (lambda found: changed(found, queue_ptr=torch.tensor([0, 1])), "not what MoCo writes"),
    "weights of nan": (
        lambda found: changed(found, **{"encoder_k.fc.2.bias": torch.full((16,), torch.nan)}),
        "key_encoder.head.2.bias of it is not finite",
    ),
    "no head": (
        lambda found: changed(found, **{f"encoder_k.fc.{i}.weight": None for i in (0, 2)}),
        "encoder_k.fc, the projection head, is not in it",
    ),
    "optimizer as list": (lambda found: {**found, "optimizer": [1]}, "not what MoCo writes"),
    "two groups": (
        lambda found: optimizer(found, lambda state: state["param_groups"].append({"params": []})),
        "several groups of parameters",
    ),
    "one parameter too few": (
        lambda found: optimizer(found, lambda state: state["param_groups"][0].update(params=list(range(123)))),
        "has 123 parameters, and its model 128",
    ),
    "Adam's": (
        lambda found: optimizer(found, lambda state: state["state"].update({0: {"exp_avg": torch.ones(1)}})),
        "momentum_buffer",
    ),
    "some without momentum": (
        lambda found: optimizer(found, lambda state: state["state"].pop(3)),
        "no finite momentum of the shape of module.encoder_q.layer1.0.conv1.weight",
    ),
    "momentum of another shape": (
        lambda found: optimizer(found, lambda state: state["state"][1].update(momentum_buffer=torch.ones(3))),
        "no finite momentum of the shape of module.encoder_q.bn1.weight",
    ),
    "momentum of nan": (
        lambda found: optimizer(found, lambda state: state["state"][1]["momentum_buffer"].fill_(torch.nan)),
        "no finite momentum of the shape of module.encoder_q.bn1.weight",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_gone_on_with(kind: str, content: dict[str, Any], config: Config) -> None:
    damage, reason = REFUSED[kind]
    if kind == "momentum of nan":
        content = {**content, "optimizer": {"param_groups": content["optimizer"]["param_groups"], "state": {}}}
        content["optimizer"]["state"] = {
            i: {"momentum_buffer": torch.zeros_like(value)}
            for i, value in enumerate(others.network("resnet18", "v2", 0).parameters())
        }
    with pytest.raises(UserError, match=rf"(?s)^given: .*{reason}"):
        foreign.read(damage(content), Path("given"), config)


def test_refused_by_the_command(content: dict[str, Any], images: Path, resnet18: Path, tmp_path: Path) -> None:
    """Each key that differs is listed; and a run that is there is never replaced."""
    given, output = tmp_path / "moco.pth.tar", tmp_path / "run"
    torch.save(changed(content, "optimizer"), given)
    other = ("model={arch: resnet50, dim: 32, mlp: false, stem: cifar}", "queue.size=144")
    done = pretrain(images, resnet18, output, *other, resume=given)
    differ = ("model.arch is 'resnet50', was 'resnet18'", "model.dim is 32, was 16", "model.mlp is False, was True")
    differ += ("model.stem is 'cifar', was 'imagenet'", "queue.size is 144, was 64")
    check_error(done.code, done.err, (f"{given}: cannot resume, it was made under another configuration", *differ))
    assert not output.exists()

    same = ("queue.size=64", "data.batch_size=32")  # 3 steps an epoch
    done = pretrain(images, resnet18, output, *same, resume=given)
    check_error(done.code, done.err, (f"{given}: nothing is left to train", "7 epochs", "trainer.epochs = 4"))
    done = pretrain(images, resnet18, output, *same, "trainer.epochs=8", "trainer.max_steps=21", resume=given)
    check_error(done.code, done.err, (f"{given}: nothing is left", "7 epochs are 21 steps", "trainer.max_steps = 21"))
    assert not output.exists()

    (output / "checkpoints").mkdir(parents=True)
    latest = output / "checkpoints" / "latest.pt"
    given.rename(latest)
    before = contents(output)
    for resume in (latest, "auto"):
        done = pretrain(images, resnet18, output, "queue.size=48", resume=resume)
        check_error(done.code, done.err, (str(latest), f"{output} already holds a run", "--set output=DIR"))
    assert contents(output) == before
