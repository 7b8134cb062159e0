"""The console command `synco-fast`."""

import contextlib
import io
import sys
from pathlib import Path
from typing import Annotated, Any, BinaryIO, cast

import typer

from synco_fast import __version__, cli_data, cli_evaluation, config
from synco_fast.errors import EXIT_ERROR, EXIT_INTERRUPTED, Interrupted, UserError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Self-supervised pretraining with SynCo, MoCHi and MoCo v2 at the speed of the hardware.",
)
app.add_typer(cli_data.app, name="data")
app.add_typer(cli_evaluation.app)

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


@app.command()
def doctor() -> None:
    """Print devices, versions and what can be used here; for what cannot, why and how to get it."""
    from synco_fast import doctor as report

    typer.echo(report.text())


class _StandardError(io.FileIO):
    """Where a run says how it gets on, perhaps a file on a disk that is full: what cannot be said ends nothing."""

    def write(self, data: Any, /) -> int:
        with contextlib.suppress(OSError):
            return super().write(data)
        return len(data)


def main() -> None:
    """Entry point: a user's error, or one of the operating system's, is one message and exit code 1."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # names of files are bytes, and are printed as they are
    if isinstance(sys.stderr, io.TextIOWrapper):
        raw = _StandardError(sys.stderr.fileno(), "w", closefd=False)
        sys.stderr = io.TextIOWrapper(
            cast(BinaryIO, raw), sys.stderr.encoding, "backslashreplace", line_buffering=True, write_through=True
        )
    try:
        app()
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_ERROR)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
