"""The whole configuration: one strict, typed schema. YAML in, `a.b=c` overrides on top, a resolved copy out.

Nothing is built from a configuration that did not pass `load`: unknown keys, wrong types and combinations that cannot
work are refused together, each by its path (`config_conflicts.py`).
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from synco_fast import config_text
from synco_fast.config_conflicts import conflicts, resize_conflict
from synco_fast.errors import UserError
from synco_fast.ops import HardNegatives
from synco_fast.ops.hard import MOST

COUNT_MAX = 2**31 - 1
Count = Annotated[int, Field(ge=0, le=COUNT_MAX)]
Vectors = Annotated[int, Field(ge=0, le=MOST)]
Positive = Annotated[int, Field(ge=1, le=COUNT_MAX)]
Share = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
AboveZero = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Pixels = Annotated[int, Field(ge=16, le=4096)]


def _check_path(path: str) -> str:
    if not path or "\0" in path:
        raise ValueError("a path")
    return path


PathText = Annotated[str, AfterValidator(_check_path)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Data(Section):
    """What is read, and how views are made."""

    root: PathText | None = Field(
        None, description="folder of images (train/<class>/*, <class>/* or flat) or of shards, or a list: see data.md"
    )
    batch_size: Positive = Field(256, description="images of one optimizer step, over all processes")
    recipe: Literal["moco_v2", "moco_v1"] = Field("moco_v2", description="augmentations")
    image_size: Pixels = Field(224, description="side of a view in pixels")
    eval_resize: Pixels = Field(256, description="shorter side before the evaluation's centre crop")
    dtype: Literal["fp32", "fp16"] = Field("fp32", description="dtype in which the pipeline hands over images")
    augmentation: Literal["auto", "compiled", "plain"] = Field(
        "auto", description="operator that makes the views; same bits; auto: compiled, or plain torch where it is not"
    )
    threads: Annotated[int, Field(ge=1, le=1024)] = Field(4, description="CPU threads of the pipeline of each process")
    prefetch: Annotated[int, Field(ge=1, le=1024)] = Field(2, description="batches prepared ahead")
    on_corrupt: Literal["fail", "skip"] = Field(
        "fail",
        description="a file that cannot be decoded ends the run, or is left out and another image takes its place",
    )


class Model(Section):
    """The two encoders."""

    arch: str = Field(
        "resnet50", description="a torchvision ResNet, ResNeXt or Wide ResNet by name, or resnet10_narrow"
    )
    stem: Literal["imagenet", "cifar"] = Field("imagenet", description="cifar: 3x3 stride 1, no max-pool")
    dim: Annotated[int, Field(ge=2, le=COUNT_MAX)] = Field(128, description="dimension D of queries and keys")
    mlp: bool = Field(True, description="2-layer MLP head (MoCo v2); false: one linear layer (MoCo v1)")
    momentum: Share = Field(0.999, description="of the key encoder")


class BatchNorm(Section):
    """Over which samples batch norm takes its statistics, so that a key cannot give away its query."""

    mode: Literal["plain", "split", "sync", "shuffle"] = Field(
        "split",
        description="split: virtual groups with shuffled keys; shuffle: keys shuffled over processes; "
        "plain (each process) and sync (all of them): a key shares statistics with its query, which leaks; to compare",
    )
    group_size: Annotated[int, Field(ge=2, le=COUNT_MAX)] = Field(32, description="samples of one group in mode split")


class Queue(Section):
    """The dictionary of past keys."""

    size: Positive = Field(65536, description="rows K")
    dtype: Literal["fp16", "bf16", "fp32"] = Field("fp16", description="dtype of the rows; similarities use it too")


class Loss(Section):
    """InfoNCE."""

    temperature: AboveZero = Field(0.2, description="temperature t")
    backend: Literal["auto", "reference", "eager", "cpu", "triton", "cuda"] = Field(
        "auto", description="backend of the op; a named one works or raises"
    )
    class_oracle: bool = Field(
        False,
        description="negatives of the query's own class are left out (MoCHi's oracle); needs labelled data; "
        "backends eager and reference",
    )


class Negatives(Section):
    """The fields of `HardNegatives`, whose defaults the method sets, and when they start."""

    n_hard: Vectors = Field(1024, description="hardest queue rows N that parents are drawn from")
    interpolated: Vectors = Field(256, description="vectors a q + (1 - a) n")
    extrapolated: Vectors = Field(256, description="vectors q + b (n - q)")
    mixed: Vectors = Field(256, description="vectors g n_i + (1 - g) n_j")
    noisy: Vectors = Field(64, description="vectors n + sigma e")
    perturbed: Vectors = Field(64, description="vectors n + delta q")
    adversarial: Vectors = Field(64, description="vectors n + eta sign(q)")
    alpha_max: float = Field(0.5, description="a ~ U(0, alpha_max)")
    beta_max: float = Field(1.5, description="b ~ U(1, beta_max)")
    gamma_max: float = Field(1.0, description="g ~ U(0, gamma_max)")
    sigma: float = Field(0.01, description="noise of the noisy kind")
    delta: float = Field(0.01, description="step of the perturbed kind")
    eta: float = Field(0.01, description="step of the adversarial kind")
    extrapolate_from: Literal["query", "negative"] = Field(
        "query", description="query: the released code's form; negative: the paper's n + b (n - q)"
    )
    warmup_epochs: Count = Field(10, description="epochs without synthetic negatives at the start")

    def hard(self) -> HardNegatives:
        """The op's description of them."""
        return HardNegatives(**self.model_dump(exclude={"warmup_epochs"}))


class Optim(Section):
    """Optimizer and learning rate."""

    name: Literal["sgd", "lars"] = Field("sgd", description="optimizer")
    lr: AboveZero = Field(0.03, description="base learning rate, which lr_scaling may scale")
    lr_scaling: Literal["none", "linear", "sqrt"] = Field(
        "none", description="none: lr as it is; linear, sqrt: it is for a batch of 256, and grows with data.batch_size"
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="of the optimizer")
    weight_decay: NonNegative = Field(1e-4, description="weight decay")
    trust: AboveZero = Field(0.001, description="trust coefficient of LARS")
    schedule: Literal["cosine", "step"] = Field("cosine", description="learning rate over the epochs")
    update: Literal["epoch", "step"] = Field("epoch", description="when the schedule moves (published rows: epoch)")
    milestones: list[Positive] = Field([120, 160], description="epochs at which schedule step decays")
    decay: AboveZero = Field(0.1, description="factor at each milestone")
    warmup_epochs: Count = Field(0, description="epochs of linear warm-up of the learning rate")
    clip_norm: AboveZero | None = Field(None, description="largest gradient norm; null: no clipping")


class Trainer(Section):
    """How long, on what, and what is reported."""

    epochs: Positive = Field(200, description="epochs, to which the schedule refers")
    max_steps: Count | None = Field(
        None, description="stop after this many steps in all, 0: at the random start; null: after the epochs"
    )
    max_hours: AboveZero | None = Field(
        None,
        description="so long after its start (torchrun's, if there is one) stop as a signal would, with a "
        "checkpoint and exit code 75; null: no limit",
    )
    skip_nonfinite: Annotated[int, Field(ge=0, le=10000)] = Field(
        0, description="steps of a non-finite loss or gradient that a run leaves out and goes on after, in all"
    )
    stall_minutes: AboveZero | None = Field(
        30.0,
        description="a process that gets no further for so long says where it and the others are, and ends; "
        "null: it waits for ever",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where there is a GPU")
    precision: Literal["fp32", "bf16"] = Field("bf16", description="bf16: the encoders run under autocast")
    accumulate: Positive = Field(1, description="micro-batches of one optimizer step")
    deterministic: bool = Field(
        False, description="the same bits in every run, on a GPU too, where it is slower; on a CPU they always are"
    )
    log_every: Positive = Field(50, description="steps between log rows; the host waits for the device only there")


class Speed(Section):
    """How a step is computed; results differ by rounding at most. performance.md says what is worth what."""

    channels_last: bool = Field(True, description="images and convolutions lie in memory channels last")
    compile: bool | Literal["auto"] = Field(
        "auto", description="torch.compile of both encoders; auto: in one process on a GPU with Triton and a C compiler"
    )
    cuda_graph: bool = Field(False, description="the whole step is one CUDA graph; one process on a GPU")
    key_stream: bool = Field(False, description="keys are computed beside the queries, on another CUDA stream")
    key_twin: bool = Field(
        False, description="keys are computed with a bfloat16 copy of the key encoder's weights; needs precision bf16"
    )
    recompute: bool = Field(
        False, description="keep only the inputs of residual blocks, and compute the rest again in backward"
    )
    optimizer: Literal["torch", "apex"] = Field("torch", description="fused SGD: PyTorch's, or NVIDIA apex's")


class Checkpoint(Section):
    """When state is written, beside training, and what stays. `latest.pt` is the newest; a stop writes one, too."""

    every_steps: Positive | None = Field(None, description="steps between checkpoints; null: at epoch ends only")
    every_epochs: Positive = Field(1, description="epochs between checkpoints")
    every_minutes: AboveZero | None = Field(
        None, description="minutes between checkpoints, written at a logging step; null: by steps and epochs alone"
    )
    keep_every: Positive = Field(20, description="epochs between the checkpoints that are kept for good")
    recent: Positive = Field(
        2, description="of the others, how many of the newest stay: a damaged one has one before it"
    )
    recent_hours: NonNegative = Field(0.0, description="younger ones stay, too, however many")


class Knn(Section):
    """Weighted k-nearest-neighbour accuracy on the held-out folder (val/ or test/)."""

    every_epochs: Count = Field(0, description="epochs between evaluations; 0: never")
    k: Positive = Field(200, description="neighbours that vote")
    temperature: AboveZero = Field(0.07, description="of the votes' weights")


class Config(Section):
    """A pretraining run."""

    method: Literal["moco", "mochi", "synco"] = Field("synco", description="sets the defaults of negatives")
    output: PathText = Field("runs/pretrain", description="folder of the run")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="of weights, order, views and negatives")
    data: Data = Data()
    model: Model = Model()
    bn: BatchNorm = BatchNorm()
    queue: Queue = Queue()
    loss: Loss = Loss()
    negatives: Negatives = Negatives()
    optim: Optim = Optim()
    trainer: Trainer = Trainer()
    speed: Speed = Speed()
    checkpoint: Checkpoint = Checkpoint()
    knn: Knn = Knn()

    def to_yaml(self) -> str:
        """The resolved configuration, every key written out."""
        return config_text.to_yaml(self.model_dump())


DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

PRESETS = {"moco": HardNegatives.none(), "mochi": HardNegatives.mochi(), "synco": HardNegatives.synco()}


def load(path: Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file, apply `a.b=c` overrides in order, check everything.

    Raises:
        UserError: naming each key that is wrong, its value, what is allowed, and the nearest key.
    """
    values = config_text.read_yaml(path)
    for override in overrides or []:
        config_text.apply_override(values, override)
    return parse(values, str(path))


def parse(values: dict[str, Any], source: str) -> Config:
    """Check plain values against the schema and against each other. `source` names them in errors."""
    preset = PRESETS.get(str(values.get("method", "synco")))
    given = values.get("negatives", {})
    if preset is not None and isinstance(given, dict):
        defaults = {key: getattr(preset, key) for key in Negatives.model_fields if key != "warmup_epochs"}
        values = {**values, "negatives": {**defaults, **given}}
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        problems = [config_text.describe(item, key_paths()) for item in error.errors()]
    else:
        problems = conflicts(config)
        if not problems:
            return config
    raise config_text.listing(f"{source}: the configuration cannot be used", problems)


class _Preparation(Section):
    data: Data


def prepare(data: Data, overrides: Sequence[str], unread: Collection[str] = ("root", "recipe")) -> Data:
    """How images are prepared for an evaluation: `data`, with overrides `data.KEY=VALUE` on top.

    Args:
        unread: keys that mean nothing there, and so are refused.

    Raises:
        UserError: naming each key that is wrong, its value, and what is allowed.
    """
    for override in overrides:
        if override.partition("=")[0].strip() in {f"data.{key}" for key in unread}:
            raise UserError(f"--set {override}: nothing here depends on it (--data gives the images)")
    values: dict[str, Any] = {"data": data.model_dump()}
    for override in overrides:
        config_text.apply_override(values, override)
    paths = {path: text for path, text in key_paths().items() if path.startswith("data.")}
    try:
        data = _Preparation.model_validate(values).data
    except ValidationError as error:
        raise config_text.listing("--set", [config_text.describe(item, paths) for item in error.errors()]) from error
    problem = resize_conflict(data)
    if problem:
        raise UserError(f"--set: {problem}")
    return data


def key_paths() -> dict[str, str]:
    """Every key's dotted path with its description."""
    paths = {}
    for name, field in Config.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            for key, inner in field.annotation.model_fields.items():
                paths[f"{name}.{key}"] = inner.description or ""
        else:
            paths[name] = field.description or ""
    return paths
