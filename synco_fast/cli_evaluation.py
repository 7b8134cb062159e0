"""The commands of `synco-fast` that judge weights or take them elsewhere."""

import math
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import typer

from synco_fast.errors import UserError

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


@app.command()
def knn(
    checkpoint: Checkpoint,
    data: LabelledData,
    k: Annotated[str, typer.Option(metavar="K[,K...]", help="Neighbours that vote; several: a sweep.")] = "200",
    temperature: Annotated[str, typer.Option(metavar="T[,T...]", help="Of the votes' weights.")] = "0.07",
    overrides: DataOverrides = None,
    device: Device = "auto",
    precision: Precision = "fp32",
    output: Annotated[Path, typer.Option(help="Folder for result.json.")] = Path("runs/knn"),
) -> None:
    """kNN accuracy of a backbone on held-out images: the images of train/ vote."""
    from synco_fast.evaluation.nearest import knn as measure
    from synco_fast.evaluation.session import Request

    ks = numbers("--k", k, int, "whole numbers above 0, as in 20,200")
    temperatures = numbers("--temperature", temperature, float, "numbers above 0, as in 0.07,0.2")
    request = Request(checkpoint, data, output, overrides or (), device, precision)
    measure(request, ks=ks, temperatures=temperatures)


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
    from synco_fast.evaluation.sweep import evaluations
    from synco_fast.evaluation.sweep_run import run

    known = evaluations(vars(typer.main.get_command(app))["commands"])
    typer.echo(run(file, data, output or Path("runs") / file.stem, jobs, known), nl=False)


def numbers(option: str, text: str, kind: type[Number], expected: str) -> list[Number]:
    """An option's comma-separated numbers, all of them finite and above 0.

    Raises:
        UserError: naming the option and what it expects.
    """
    try:
        values = [kind(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(0 < value < math.inf for value in values):
        raise UserError(f"{option} {text}: expected {expected}")
    return values


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
