"""The commands of `synco-fast` that judge weights or take them elsewhere."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import typer

from synco_fast.errors import UserError

if TYPE_CHECKING:
    from synco_fast.evaluation.session import Request
    from synco_fast.evaluation.sweep_options import Evaluation

app = typer.Typer()

Number = TypeVar("Number", int, float)

Checkpoint = Annotated[
    Path,
    typer.Argument(
        help="A run's checkpoint, a .pth.tar of MoCo, SynCo or MoCHi, a torchvision state dict, or safetensors."
    ),
]
LabelledData = Annotated[
    Path, typer.Option("--data", help="Class folders: train/, and val/ or test/ beside it, which is held out.")
]
DataOverrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="data.KEY=VALUE", help="How images are prepared, as in data.image_size=96."),
]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto: cuda where there is a GPU.")]
Precision = Annotated[Literal["fp32", "bf16"], typer.Option(help="bf16: the backbone runs under autocast.")]


def _numbers(text: str, kind: type[Number]) -> list[Number]:
    """Comma-separated numbers."""
    return [kind(part) for part in text.split(",")]


def _above_zero(kind: type[Number], expected: str) -> Callable[[typer.CallbackParam, str | None], str | None]:
    """The check of an option of comma-separated numbers: all of them are finite and above 0, as is `expected`."""

    def check(parameter: typer.CallbackParam, value: str | None) -> str | None:
        try:
            good = value is None or all(0 < number < math.inf for number in _numbers(value, kind))
        except ValueError:
            good = False
        if not good:
            raise UserError(f"{parameter.opts[0]} {value}: expected {expected}")
        return value

    return check


_RATES = _above_zero(float, "numbers above 0, as in 0.01,0.05")

Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of all that is random.")]
Resume = Annotated[
    str | None, typer.Option(help='"auto": go on from the output\'s latest checkpoint, if any; or its path.')
]


@app.command()
def knn(
    checkpoint: Checkpoint,
    data: LabelledData,
    k: Annotated[
        str,
        typer.Option(
            metavar="K[,K...]",
            help="Neighbours that vote; several: a sweep.",
            callback=_above_zero(int, "whole numbers above 0, as in 20,200"),
        ),
    ] = "200",
    temperature: Annotated[
        str,
        typer.Option(
            metavar="T[,T...]",
            help="Of the votes' weights.",
            callback=_above_zero(float, "numbers above 0, as in 0.07,0.2"),
        ),
    ] = "0.07",
    overrides: DataOverrides = None,
    device: Device = "auto",
    precision: Precision = "fp32",
    output: Annotated[Path, typer.Option(help="Folder for result.json.")] = Path("runs/knn"),
) -> None:
    """kNN accuracy of a backbone on held-out images: the images of train/ vote."""
    from synco_fast.evaluation.nearest import knn as measure
    from synco_fast.evaluation.session import Request

    request = Request(checkpoint, data, output, overrides or (), device, precision)
    measure(request, ks=_numbers(k, int), temperatures=_numbers(temperature, float))


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(metavar="SWEEP", help="YAML file, such as those in configs/sweeps/.")],
    data: Annotated[Path, typer.Option(help="The images, with a held-out val/ or test/ where evaluations need it.")],
    output: Annotated[Path | None, typer.Option(help="Folder of all runs.  [default: runs/ and SWEEP's name]")] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Runs at a time.  [default: the number of GPUs, or 1]")
    ] = None,
) -> None:
    """Pretrain with several settings and seeds, judge each, and tabulate; started again, it goes on where it was."""
    from synco_fast.evaluation.sweep_run import run

    typer.echo(run(file, data, output or Path("runs") / file.stem, jobs, evaluations()), nl=False)


def evaluations() -> dict[str, "Evaluation"]:
    """The commands that a sweep may run on a checkpoint."""
    from synco_fast.evaluation.sweep_options import Evaluation

    commands = vars(typer.main.get_command(app))["commands"]
    checks = {"knn": lambda context: None, "linear": _check_linear, "semisup": _check_semisup}
    return {name: Evaluation(commands[name], check) for name, check in checks.items()}


@app.command()
def linear(
    context: typer.Context,
    checkpoint: Checkpoint,
    data: LabelledData,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over train/.")] = 100,
    lr: Annotated[float, typer.Option(help="At the start, for the whole batch.")] = 30.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images of a step, over all processes.")] = 256,
    milestones: Annotated[
        str | None,
        typer.Option(
            metavar="E[,E...]",
            help="Epochs at which the rate falls to a tenth; left out: 60% and 80%.",
            callback=_above_zero(int, "whole numbers above 0, as in 60,80"),
        ),
    ] = None,
    seed: Seed = 0,
    resume: Resume = None,
    cached: Annotated[
        bool,
        typer.Option("--cached", help="Logistic regression on centre-crop features instead: an approximation."),
    ] = False,
    overrides: DataOverrides = None,
    device: Device = "auto",
    precision: Precision = "fp32",
    output: Annotated[Path, typer.Option(help="Folder for result.json, metrics and checkpoints.")] = Path(
        "runs/linear"
    ),
) -> None:
    """Linear probe: top-1 and top-5 accuracy of one linear layer trained on a frozen backbone."""
    from synco_fast.evaluation.session import Request

    request = Request(checkpoint, data, output, overrides or (), device, precision)
    if cached:
        _linear_cached(context, request, seed)
        return
    from synco_fast.evaluation import linear as probe

    probe.linear(
        request,
        epochs=epochs,
        lr=lr,
        batch_size=batch_size,
        milestones=_milestones(milestones),
        seed=seed,
        resume=resume,
    )


def _linear_cached(context: typer.Context, request: "Request", seed: int) -> None:
    """`linear --cached`, which none of the options of training goes with."""
    from synco_fast.evaluation.cached import cached

    _check_cached(context)
    cached(request, seed=seed)


def _check_linear(context: typer.Context) -> None:
    """Refuse options of `linear` that cannot be used together, as it would."""
    from synco_fast.evaluation import linear as probe

    given = context.params
    if given["cached"]:
        _check_cached(context)
    else:
        probe.checked(given["epochs"], given["lr"], _milestones(given["milestones"]))


def _milestones(text: str | None) -> list[int] | None:
    return None if text is None else _numbers(text, int)


def _check_cached(context: typer.Context) -> None:
    for name in ("epochs", "lr", "batch_size", "milestones", "resume"):
        source = context.get_parameter_source(name)
        if source is not None and source.name != "DEFAULT":
            raise UserError(
                f"--cached and --{name.replace('_', '-')}: nothing is trained by steps; give one of the two"
            )


@app.command()
def semisup(
    checkpoint: Checkpoint,
    data: LabelledData,
    fraction: Annotated[float, typer.Option(help="Share of the labels to train with: 0.01, 0.1, 1, or another.")],
    listed: Annotated[
        Path | None,
        typer.Option("--list", help="Names of the labelled images, one a line; left out: drawn, and written down."),
    ] = None,
    lr_backbone: Annotated[
        str, typer.Option(metavar="LR[,LR...]", help="Of the backbone.", callback=_RATES)
    ] = "0.005,0.01,0.02,0.05,0.1",
    lr_head: Annotated[
        str, typer.Option(metavar="LR[,LR...]", help="Of the linear layer. Each pair is tried.", callback=_RATES)
    ] = "0.5",
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Left out: 60, 30 and 90 for fractions of 0.01, 0.1 and 1.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images of a step, over all processes.")] = 1024,
    weight_decay: Annotated[float, typer.Option(help="Of all weights.")] = 1e-6,
    seed: Seed = 0,
    resume: Resume = None,
    overrides: DataOverrides = None,
    device: Device = "auto",
    precision: Precision = "fp32",
    output: Annotated[Path, typer.Option(help="Folder for result.json, finetuned.pth, metrics and so on.")] = Path(
        "runs/semisup"
    ),
) -> None:
    """Semi-supervised: fine-tune on a share of the labels, with rates chosen on a part of them held back."""
    from synco_fast.evaluation import semisup as tuning
    from synco_fast.evaluation.session import Request

    tuning.semisup(
        Request(checkpoint, data, output, overrides or (), device, precision),
        fraction=fraction,
        listed=listed,
        lr_backbone=_numbers(lr_backbone, float),
        lr_head=_numbers(lr_head, float),
        epochs=epochs,
        batch_size=batch_size,
        weight_decay=weight_decay,
        seed=seed,
        resume=resume,
    )


def _check_semisup(context: typer.Context) -> None:
    """Refuse options of `semisup` that cannot be used together, as it would."""
    from synco_fast.evaluation import semisup as tuning

    given = context.params
    tuning.checked(given["fraction"], given["epochs"], given["weight_decay"])


@app.command()
def export(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Argument(help="The file to write; OUT.json beside it says what it is.")],
    form: Annotated[
        Literal["torchvision", "timm", "safetensors", "detectron2"],
        typer.Option("--format", help="torchvision: .pth; timm, safetensors: .safetensors; detectron2: .pkl."),
    ],
) -> None:
    """Write a checkpoint's query encoder for another library: the backbone, or all of it as safetensors."""
    from synco_fast.evaluation.export import export as write

    result = write(checkpoint, out, form)
    file = result["file"]
    typer.echo(
        f"wrote {out}: {result['weights']['arch']}, {file['tensors']} tensors, {file['parameters']:,} parameters\n"
        f"load it with: {result['load']}"
    )


@app.command()
def analyze(
    checkpoint: Checkpoint,
    data: LabelledData,
    queries: Annotated[
        int | None, typer.Option(help="Images whose two views are compared; else 2048, at most a quarter.")
    ] = None,
    queue: Annotated[
        int | None, typer.Option(help="Other images, whose keys are the negatives; else 65536, at most the rest.")
    ] = None,
    n_hard: Annotated[
        int | None, typer.Option(help="Size of the hard set; else the run's or 1024, at most the queue's.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of images, views and synthetic negatives.")] = 0,
    tsne: Annotated[bool, typer.Option("--tsne", help="Project held-out images by t-SNE, too.")] = False,
    overrides: DataOverrides = None,
    device: Device = "auto",
    precision: Precision = "fp32",
    output: Annotated[Path, typer.Option(help="Folder for result.json and report.html.")] = Path("runs/analyze"),
) -> None:
    """Show an embedding: alignment, uniformity, the proxy task, its hard negatives and their classes."""
    from synco_fast.evaluation.analyze import analyze as measure
    from synco_fast.evaluation.session import Request

    request = Request(checkpoint, data, output, overrides or (), device, precision)
    result = measure(request, queries=queries, queue=queue, n_hard=n_hard, seed=seed, tsne=tsne)
    found = result["metrics"]
    typer.echo(f"alignment {found['alignment']:.4f}, uniformity {found['uniformity']:.4f}")
    typer.echo(
        f"proxy acc@1 {found['proxy_acc1']:.2%}, with synthetic negatives {found['proxy_acc1_with_synthetic']:.2%}"
    )
    typer.echo(f"same-class share of the hard set {found['same_class_share']:.2%}; {output / 'report.html'}")
