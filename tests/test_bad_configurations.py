"""Configurations that cannot be used: each gives one screen that names the culprit, and leaves nothing half-written."""

from pathlib import Path

import pytest

from synco_fast.ops import backends
from tests.command import call, check_refused, one_step

NO_KIND = [
    f"negatives.{kind}=0" for kind in ("interpolated", "extrapolated", "mixed", "noisy", "perturbed", "adversarial")
]

# Overrides of the sound configuration TINY, and what the message must hold besides.
CONFIGURATIONS: list[tuple[list[str], tuple[str, ...]]] = [
    # keys
    (["optim.leraning_rate=0.1"], ("optim.leraning_rate", "docs/configuration.md")),
    (["negatives.alpha=0.5"], ("negatives.alpha = 0.5", "did you mean negatives.alpha_max?")),
    (["optm.lr=0.1"], ("optm", "did you mean optim?")),
    (["temprature=0.1"], ("temprature", "did you mean loss.temperature or knn.temperature?")),
    (["optim.lr.x=0.1"], ("optim.lr", "{'x': 0.1}")),
    (["seed.x=1", "seed.y.z=1"], ("seed", "{'x': 1, 'y': {'z': 1}}")),
    # the overrides themselves
    (["foo"], ("--set foo", "KEY=VALUE")),
    (["a.b"], ("--set a.b", "KEY=VALUE")),
    (["=3"], ("--set =3", "KEY=VALUE")),
    (["optim..lr=3"], ("--set optim..lr=3", "KEY=VALUE")),
    (["optim=3", "optim.lr=3"], ("--set optim.lr=3", "optim is a value")),
    (["optim.lr=["], ("--set optim.lr=[", "not valid YAML")),
    (["seed=2020-13-45"], ("--set seed=2020-13-45", "not valid YAML")),
    (["seed=!!python/object/apply:os.getpid []"], ("--set seed=", "python/object")),
    # types
    (["optim.lr=fast"], ("optim.lr = 'fast'", "number")),
    (["queue.size=many"], ("queue.size = 'many'", "integer")),
    (["queue.size=64.0"], ("queue.size = 64.0", "integer")),
    (["queue.size=null"], ("queue.size = None", "integer")),
    (["trainer.epochs=true"], ("trainer.epochs = True", "integer")),
    (["model.mlp=1"], ("model.mlp = 1", "boolean")),
    (["optim=[1, 2]"], ("optim = [1, 2]", "section")),
    (["data=null"], ("data = None", "section")),
    (["optim.milestones=120"], ("optim.milestones = 120", "list")),
    (["data.root=5"], ("data.root = 5", "string")),
    (["output="], ("output = None", "string")),
    # choices
    (["method=sinco"], ("method = 'sinco'", "'synco'")),
    (["model.arch=resnet51"], ("model.arch = 'resnet51'", "resnet50")),
    (["data.recipe=moco"], ("data.recipe = 'moco'", "'moco_v2'")),
    (["bn.mode=ghost"], ("bn.mode = 'ghost'", "'split'")),
    (["loss.backend=cudnn"], ("loss.backend = 'cudnn'", "'eager'")),
    # how a step is computed
    (["speed.compile=fast"], ("speed.compile", "'auto'")),
    (["speed.cuda_graph=true"], ("speed.cuda_graph = true", "needs a GPU")),
    (["speed.key_stream=true"], ("speed.key_stream = true", "needs a GPU")),
    (["speed.optimizer=apex"], ("speed.optimizer = apex", "needs a GPU")),
    (["optim.name=lars", "speed.optimizer=apex"], ("speed.optimizer = apex", "optim.name = sgd")),
    (["speed.optimizer=apex", "speed.cuda_graph=true"], ("CUDA graph", "speed.optimizer = apex")),
    (["speed.key_twin=true"], ("speed.key_twin = true", "trainer.precision = bf16")),
    (["speed.recompute=true", "speed.compile=true"], ("speed.recompute = true", "speed.compile to false")),
    # ranges
    (["loss.temperature=0"], ("loss.temperature = 0", "greater than 0")),
    (["loss.temperature=-0.2"], ("loss.temperature = -0.2", "greater than 0")),
    (["loss.temperature=.nan"], ("loss.temperature = nan", "finite")),
    (["loss.temperature=.inf"], ("loss.temperature = inf", "finite")),
    (["optim.lr=0"], ("optim.lr = 0", "greater than 0")),
    (["optim.momentum=1"], ("optim.momentum = 1", "less than 1")),
    (["model.momentum=.nan"], ("model.momentum = nan",)),
    (["optim.clip_norm=0"], ("optim.clip_norm = 0", "greater than 0")),
    (["negatives.mixed=-1"], ("negatives.mixed = -1", "greater than or equal to 0")),
    (["trainer.epochs=0"], ("trainer.epochs = 0",)),
    (["trainer.max_steps=-1"], ("trainer.max_steps = -1",)),
    (["checkpoint.every_steps=0"], ("checkpoint.every_steps = 0",)),
    (["data.batch_size=0"], ("data.batch_size = 0",)),
    (["knn.k=0"], ("knn.k = 0",)),
    (["seed=-1"], ("seed = -1",)),
    (["seed=9223372036854775808"], ("seed = 9223372036854775808",)),
    ([f"trainer.epochs=1{'0' * 400}"], ("trainer.epochs = 1000", "2147483647")),
    (["data.threads=100000"], ("data.threads = 100000", "1024")),
    (["data.image_size=100000", "data.eval_resize=100000"], ("data.image_size = 100000", "4096")),
    (["output=''"], ("output = ''", "a path")),
    (['output="a\\0b"'], ("output = 'a\\x00b'", "a path")),
    (["data.root=''"], ("data.root = ''", "a path")),
    (["negatives.alpha_max=2"], ("negatives.alpha_max", "2")),
    (["negatives.beta_max=0.5"], ("negatives.beta_max", "0.5")),
    (["negatives.sigma=.nan"], ("negatives.sigma", "nan")),
    (["optim.milestones=[0]"], ("optim.milestones.0 = 0",)),
    # combinations
    (["negatives.n_hard=0"], ("negatives.n_hard is 0",)),
    (["negatives.n_hard=65"], ("negatives.n_hard = 65", "queue.size = 64")),
    (
        ["loss.class_oracle=true", "loss.backend=cpu"],
        ("loss.class_oracle = true", "loss.backend = cpu", "auto, eager or reference"),
    ),
    (["loss.backend=cuda", "loss.class_oracle=true"], ("loss.class_oracle = true", "loss.backend = cuda")),
    (["queue.size=72"], ("queue.size = 72", "data.batch_size = 16")),
    (["bn.group_size=5"], ("bn.group_size = 5", "divisor of 16")),
    (["bn.group_size=16"], ("bn.group_size = 16", "2 or more whole groups")),
    (["trainer.accumulate=3"], ("trainer.accumulate = 3", "data.batch_size = 16")),
    (["trainer.accumulate=8"], ("bn.group_size = 4", "2 samples")),
    (["data.eval_resize=16"], ("data.eval_resize = 16", "data.image_size = 32")),
    (["optim.warmup_epochs=4"], ("optim.warmup_epochs = 4", "trainer.epochs = 4")),
    (["optim.milestones=[160, 120]"], ("optim.milestones = [160, 120]", "ascend")),
    (["method=moco"], ("negatives.interpolated = 4", "method moco")),
    (["method=mochi"], ("negatives.noisy = 4", "method mochi")),
    (NO_KIND, ("method synco", "method to moco")),
    # what this machine or this number of processes cannot do
    (["bn.mode=shuffle"], ("bn.mode = shuffle", "2 or more processes")),
    (["bn.mode=sync"], ("bn.mode = sync", "2 or more processes")),
    *(([f"loss.backend={name}"], (f"loss.backend = {name}", why)) for name, why in backends().items() if why != "ok"),
    # beyond any address space, so that no machine tries
    (["queue.size=2147483632", "model.dim=32768"], ("out of memory", "queue.size = 2147483632")),
]


def test_the_sound_case_trains(images: Path, tiny: Path, tmp_path: Path) -> None:
    """What all cases below differ from in one thing."""
    done = call(*one_step(tiny, images, tmp_path / "run"))
    assert done.code == 0, done.err
    assert (tmp_path / "run" / "checkpoints" / "latest.pt").is_file()


@pytest.mark.parametrize(("overrides", "names"), CONFIGURATIONS, ids=lambda value: str(value[0])[:40])
def test_configurations(overrides: list[str], names: tuple[str, ...], images: Path, tiny: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    check_refused(output, *one_step(tiny, images, output, *overrides), names=names)


BOMB = "\n".join(
    ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 8)}]" for i in range(1, 12))]
)

CONFIGURATION_FILES: dict[str, tuple[bytes | None, tuple[str, ...]]] = {
    "missing": (None, ("No such file",)),
    "binary": (bytes(range(256)), ("not text in UTF-8",)),
    "nul characters": (b"seed: 1\0", ("not valid YAML",)),
    "not YAML": (b"optim: {lr: 0.1\nseed: 3", ("not valid YAML", "line 2")),
    "a tab": (b"optim:\n\tlr: 0.1\n", ("not valid YAML", "line 2")),
    "a list": (b"- method: synco\n", ("got list",)),
    "a word": (b"synco", ("got str",)),
    "duplicate key": (b"optim: {lr: 0.1, lr: 0.2}\n", ("key lr is given twice", "line 1")),
    "duplicate section": (b"optim: {lr: 0.1}\noptim: {momentum: 0.9}\n", ("key optim is given twice", "line 2")),
    "key that is a number": (b"1: 2\n", ("key 1 is not text", "line 1")),
    "two documents": (b"seed: 1\n---\nseed: 2\n", ("not valid YAML",)),
    "python tag": (b"seed: !!python/object/apply:os.system ['exit 1']\n", ("python/object/apply:os.system",)),
    "undefined alias": (b"seed: *one\n", ("undefined alias",)),
    "deep nesting": (b"[" * 5000, ("not valid YAML",)),
    "another program's": ("\n".join(f"service{i}: {{image: x}}" for i in range(60)).encode(), ("service0", "45 more")),
    "aliases that multiply": (BOMB.encode(), ("a11 = ",)),
}


@pytest.mark.parametrize("kind", CONFIGURATION_FILES)
def test_configuration_files(kind: str, images: Path, tiny: Path, tmp_path: Path) -> None:
    content, names = CONFIGURATION_FILES[kind]
    config = tmp_path / "given.yaml"
    if content is not None:
        config.write_bytes(content)
    output = tmp_path / "run"
    check_refused(output, *one_step(config, images, output), names=(str(config), *names))


def test_a_folder_as_configuration(images: Path, tiny: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    check_refused(output, *one_step(tmp_path, images, output), names=(str(tmp_path), "Is a directory"))
