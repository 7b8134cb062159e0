"""The console command `synco-fast`."""

import io
import math
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from synco_fast import __version__, config
from synco_fast.errors import Interrupted, UserError

EXIT_ERROR = 1
EXIT_INTERRUPTED = 75
"""Stopped by a signal with its state saved: start it again with --resume auto (EX_TEMPFAIL of sysexits.h)."""

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Self-supervised pretraining with SynCo, MoCHi and MoCo v2 at the speed of the hardware.",
)
data_app = typer.Typer(no_args_is_help=True, help="Look at a data set as pretraining sees it, or pack it.")
app.add_typer(data_app, name="data")

DataRoot = Annotated[
    Path, typer.Argument(help="Folder (train/<class>/*, <class>/*, flat, *.tar or *.tfrecord) or file list.")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, as in optim.lr=0.06.")
]


def _with_data(resolved: config.Config, data: Path | None) -> config.Config:
    if data is None:
        return resolved
    return resolved.model_copy(update={"data": resolved.data.model_copy(update={"root": str(data)})})


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Self-supervised pretraining with SynCo, MoCHi and MoCo v2 at the speed of the hardware."""


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for data, run and report.")] = Path("runs/demo"),
) -> None:
    """See SynCo learn: make a JPEG data set, pretrain on it, and write report.html."""
    from synco_fast.demo import run

    run(output)


@app.command()
def pretrain(
    config_file: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file, such as those in configs/.")],
    overrides: Overrides = None,
    data: Annotated[Path | None, typer.Option(help="The images: short for --set data.root=...")] = None,
    resume: Annotated[
        str | None, typer.Option(help='"auto": go on from the output\'s latest checkpoint, if any; or its path.')
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the resolved configuration and leave.")
    ] = False,
) -> None:
    """Pretrain an encoder. Under torchrun: torchrun --nproc-per-node=N -m synco_fast pretrain CONFIG ..."""
    resolved = _with_data(config.load(config_file, overrides), data)
    if print_config:
        typer.echo(resolved.to_yaml(), nl=False)
        return
    from synco_fast.engine import run

    run.pretrain(resolved, resume=resume)


@app.command()
def knn(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint of a pretraining run.")],
    data: Annotated[Path, typer.Option(help="Class folders: train/ is the bank; val/ or test/ is classified.")],
    k: Annotated[int, typer.Option(min=1, help="Neighbours that vote.")] = 200,
    temperature: Annotated[float, typer.Option(help="Of the votes' weights.")] = 0.07,
) -> None:
    """kNN accuracy of a checkpoint's backbone on held-out images."""
    from synco_fast.engine import evaluate

    if not 0 < temperature < math.inf:
        raise UserError(f"--temperature {temperature}: expected a number above 0")
    result = evaluate.knn(checkpoint, data, k=k, temperature=temperature)
    typer.echo(
        f"kNN accuracy {result['accuracy']:.2%} (k {result['k']}, t {temperature}, "
        f"bank {result['bank']}, held out {result['held_out']})"
    )


@app.command()
def profile(
    config_file: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file, such as those in configs/.")],
    overrides: Overrides = None,
    data: Annotated[Path | None, typer.Option(help="The images: short for --set data.root=...")] = None,
    synthetic: Annotated[
        bool, typer.Option("--synthetic", help="Noise in place of images: the step alone, no waiting for data.")
    ] = False,
    steps: Annotated[int, typer.Option(min=1, help="Steps to time stage by stage.")] = 20,
    rounds: Annotated[int, typer.Option(min=3, help="Rounds of each comparison.")] = 10,
    output: Annotated[Path, typer.Option(help="Folder for profile.json, report.html and trace.json.gz.")] = Path(
        "runs/profile"
    ),
) -> None:
    """Take the training step apart: its stages, the op, what each kind of negative costs, and what limits it."""
    resolved = _with_data(config.load(config_file, overrides), data)
    if synthetic and data is not None:
        raise UserError(f"--synthetic and --data {data}: noise takes the place of images; give one of the two")
    from synco_fast.profiling import profile as profiling

    profiling.run(resolved, source=str(config_file), output=output, steps=steps, rounds=rounds, synthetic=synthetic)


@data_app.command()
def view(
    root: DataRoot,
    output: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("views.png"),
    images: Annotated[int, typer.Option(min=1, help="Images to show.")] = 8,
    recipe: Annotated[str, typer.Option(help="moco_v2 or moco_v1.")] = "moco_v2",
    image_size: Annotated[int, typer.Option(min=16, max=4096, help="Side of a view in pixels.")] = 224,
    seed: Annotated[int, typer.Option(min=0, help="Of the views.")] = 0,
) -> None:
    """Write a grid of augmented views: each row an image and its two views."""
    from synco_fast.data.grid import save_grid
    from synco_fast.data.index import scan
    from synco_fast.data.recipes import RECIPES

    if recipe not in RECIPES:
        raise UserError(f"--recipe {recipe}: expected one of {', '.join(RECIPES)}")
    save_grid(scan(root), output, n=images, image_size=image_size, recipe=RECIPES[recipe], seed=seed)
    typer.echo(f"wrote {output}")


@data_app.command()
def stats(root: DataRoot) -> None:
    """Print how many images there are, by class and format, and how large they are."""
    from synco_fast.data.index import scan
    from synco_fast.data.stats import statistics, table

    typer.echo(table(statistics(scan(root))))


@data_app.command()
def pack(
    source: DataRoot,
    output: Annotated[Path, typer.Argument(help="Folder for the shards: new, or one to go on with.")],
    shard_size: Annotated[float, typer.Option(metavar="MB", help="Size of a shard in MB (10^6 bytes).")] = 500,
) -> None:
    """Copy a data set into WebDataset shards, all its splits; started again, it goes on where it was stopped."""
    from synco_fast.data import pack as packing

    if not 0 < shard_size < math.inf:
        raise UserError(f"--shard-size {shard_size}: expected a number of MB above 0")
    for folder, index in packing.pack(source, output, int(shard_size * 1e6)):
        typer.echo(f"{folder}: {len(index)} images in {len(index.shards)} shards")


@data_app.command()
def verify(
    root: DataRoot,
    output: Annotated[
        Path | None, typer.Option(help="Write a list of the good files there, to be given as data.root.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; as many as CPUs if not given.")] = None,
) -> None:
    """Decode every image and name those that cannot be. Exit code 1 if there are any."""
    from synco_fast.data import verify as verification
    from synco_fast.data.index import scan
    from synco_fast.data.listing import check_listable, write_list

    index = scan(root)
    if output is not None:
        check_listable(index, output)  # not after an hour of decoding
        if output.is_dir() or not os.access(output.parent, os.W_OK | os.X_OK):
            raise UserError(
                f"{output}: no list of images can be written there; name a file in a folder you can write to"
            )
    report = verification.verify(index, workers)
    typer.echo(report.text())
    if output is not None:
        write_list(report.good(), output)
        typer.echo(f"wrote the good ones to {output}")
    if report.faults:
        raise typer.Exit(EXIT_ERROR)


@app.command()
def doctor() -> None:
    """Print devices, versions and what can be used here; for what cannot, why and how to get it."""
    from synco_fast import doctor as report

    typer.echo(report.text())


def main() -> None:
    """Entry point: a user's error, or one of the operating system's, is one message and exit code 1."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # names of files are bytes, and are printed as they are
    try:
        app()
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_ERROR)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
