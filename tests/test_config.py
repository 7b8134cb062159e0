"""The schema: what is read, printed, documented and shipped is the same, and the published rows are as published."""

import re
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
import yaml

from synco_fast import config, config_table
from synco_fast.ops import KINDS
from tests.command import call
from tests.conftest import REPOSITORY

SHIPPED = sorted((REPOSITORY / "configs").glob("*.yaml"))
MANY = "interpolated: 256, extrapolated: 256, mixed: 256, noisy: 64, perturbed: 64, adversarial: 64"
PUBLISHED = {
    "synco_r50_200ep": (f"n_hard: 1024, {MANY}, warmup_epochs: 10", 200, 65536),
    "synco_r50_800ep": (f"n_hard: 1024, {MANY}, warmup_epochs: 10", 800, 65536),
    "synco_r50_imagenet100_200ep": (f"n_hard: 1024, {MANY}, warmup_epochs: 10", 200, 16384),
    "mochi_r50_200ep": ("n_hard: 1024, mixed: 1024, interpolated: 128, warmup_epochs: 10", 200, 65536),
    "moco_v2_r50_200ep": ("n_hard: 0", 200, 65536),
}


def yaml_files(folder: Path) -> dict[str, bytes]:
    """All of them, by their paths in the folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.yaml")}


def shipped(name: str) -> config.Config:
    return config.load(REPOSITORY / "configs" / f"{name}.yaml")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_rows(name: str) -> None:
    """Against section 2 of the design: SynCo (arXiv 2410.02401), MoCHi (2010.01028), MoCo v2 (2003.04297)."""
    negatives, epochs, rows = PUBLISHED[name]
    row = shipped(name)
    assert row.method == name.split("_")[0]
    expected = dict.fromkeys(KINDS, 0) | yaml.safe_load(f"{{{negatives}}}")
    assert {key: getattr(row.negatives, key) for key in expected} == expected
    strengths = [row.negatives.alpha_max, row.negatives.beta_max, row.negatives.gamma_max]
    steps = [row.negatives.sigma, row.negatives.delta, row.negatives.eta]
    assert (strengths, steps) == ([0.5, 1.5, 1.0], [0.01, 0.01, 0.01])
    assert row.negatives.extrapolate_from == "query"
    assert (row.model.arch, row.model.dim, row.model.mlp, row.model.momentum) == ("resnet50", 128, True, 0.999)
    assert (row.model.stem, row.data.recipe, row.data.image_size) == ("imagenet", "moco_v2", 224)
    assert (row.data.eval_resize, row.data.batch_size) == (256, 256)
    assert (row.queue.size, row.loss.temperature, row.trainer.epochs) == (rows, 0.2, epochs)
    assert (row.optim.name, row.optim.lr, row.optim.momentum, row.optim.weight_decay) == ("sgd", 0.03, 0.9, 1e-4)
    assert (row.optim.schedule, row.optim.update, row.optim.warmup_epochs) == ("cosine", "epoch", 0)


def test_defaults_are_the_published_row(tmp_path: Path) -> None:
    empty = tmp_path / "empty.yaml"
    empty.write_text("")
    row = shipped("synco_r50_200ep")
    assert config.load(empty, [f"output={row.output}"]) == row


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_printed_configuration_loads_again(path: Path, tmp_path: Path) -> None:
    done = call("pretrain", path, "--set", "optim.clip_norm=0.5", "--print-config")
    assert done.code == 0, done.err
    again = tmp_path / "again.yaml"
    again.write_text(done.out)
    assert config.load(again) == config.load(path, ["optim.clip_norm=0.5"])
    printed = yaml.safe_load(done.out)
    assert {
        f"{name}.{key}" if isinstance(value, dict) else name
        for name, value in printed.items()
        for key in (value if isinstance(value, dict) else [name])
    } == set(config.key_paths())


def test_installed_configurations_are_the_folder(tmp_path: Path) -> None:
    """What setup.py would put into a wheel, and what is installed now."""
    contents = yaml_files(REPOSITORY / "configs")
    assert len(contents) >= 9
    with resources.as_file(resources.files("synco_fast.configs")) as installed:
        assert yaml_files(installed) == contents
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, tmp_path)
    for name in ("synco_fast", "configs"):
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", "built"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert yaml_files(tmp_path / "built" / "synco_fast" / "configs") == contents


def test_every_key_is_described_and_documented() -> None:
    paths = config.key_paths()
    assert all(paths.values()), [path for path, text in paths.items() if not text]
    page = (REPOSITORY / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == config_table.markdown(), "python -m synco_fast.config_table > docs/configuration.md"
    assert [path for path in paths if f"| `{path}` |" not in page] == []


def test_no_key_is_without_use() -> None:
    """Each is read as an attribute of its section, under the names that the sources have for sections."""
    sources = [path for path in (REPOSITORY / "synco_fast").rglob("*.py") if not path.name.startswith("config")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    used_by_name = {f"negatives.{kind}" for kind in KINDS}
    aliases = {"checkpoint": "checkpoint|settings", "negatives": "negatives|hard", "": "config"}
    unused = []
    for path in config.key_paths():
        section, _, key = path.rpartition(".")
        if path not in used_by_name and not re.search(rf"\b({aliases.get(section, section)})\.{key}\b", text):
            unused.append(path)
    assert unused == []


def test_numbers() -> None:
    """YAML 1.1 takes 1e-4 for text."""
    assert shipped("cifar10_r18").optim.weight_decay == 5e-4
    for text, value in (("1e-4", 1e-4), ("1E+2", 100.0), ("-2e0", -2.0), ("3.e1", 30.0), ("7", 7), ("1_000", 1000)):
        values: dict[str, object] = {}
        config.config_text.apply_override(values, f"a.b={text}")
        found = values["a"]["b"]  # type: ignore[index]
        assert found == value and type(found) is type(value), text
    assert isinstance(config.load(SHIPPED[0], ["optim.lr=1"]).optim.lr, float)


def test_later_overrides_win(tiny: Path) -> None:
    loaded = config.load(tiny, ["optim.lr=1", "optim={lr: 2, momentum: 0.5}", "optim.lr=3", "seed=4", "seed=5"])
    assert (loaded.optim.lr, loaded.optim.momentum, loaded.seed) == (3.0, 0.5, 5)
    done = call("pretrain", tiny, "--data", "there", "--set", "data.root=here", "--print-config")
    assert yaml.safe_load(done.out)["data"]["root"] == "there"


@pytest.mark.parametrize(
    "root",
    ["it's", 'a "b"', "with  spaces ", "Bilder/größe/画像", "a: b # c", "1e5", "2024", "null", "[x]", "a\nb", "\udce9"],
)
def test_data_takes_any_path(root: str, tiny: Path, tmp_path: Path) -> None:
    """Also what YAML would read as something else; the last is a file name that is not UTF-8."""
    done = call("pretrain", tiny, "--data", root, "--print-config")
    again = tmp_path / "again.yaml"
    again.write_text(done.out)
    assert config.load(again).data.root == root


def test_methods_set_the_negatives(tmp_path: Path) -> None:
    """Keys that are given win over the method's, one by one."""
    path = tmp_path / "method.yaml"
    path.write_text("method: mochi\nnegatives: {mixed: 512}")
    negatives = config.load(path).negatives
    counts = {kind: getattr(negatives, kind) for kind in KINDS if getattr(negatives, kind)}
    assert (negatives.n_hard, counts) == (1024, {"interpolated": 128, "mixed": 512})
    assert config.load(path, ["method=moco", "negatives={}"]).negatives.hard().total == 0
