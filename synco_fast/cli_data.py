"""`synco-fast data`: a data set looked at, packed, verified."""

import math
import os
from pathlib import Path
from typing import Annotated

import typer

from synco_fast.errors import EXIT_ERROR, UserError

app = typer.Typer(no_args_is_help=True, help="Look at a data set as pretraining sees it, or pack it.")

DataRoot = Annotated[
    Path, typer.Argument(help="Folder (train/<class>/*, <class>/*, flat, *.tar or *.tfrecord) or file list.")
]


@app.command()
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


@app.command()
def stats(root: DataRoot) -> None:
    """Print how many images there are, by class and format, and how large they are."""
    from synco_fast.data.index import scan
    from synco_fast.data.stats import statistics, table

    typer.echo(table(statistics(scan(root))))


@app.command()
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


@app.command()
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
