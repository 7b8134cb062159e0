"""The console command in this process, through its real entry point: starting Python and torch takes seconds a time."""

import contextlib
import hashlib
import io
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from synco_fast.cli import main

_SCREEN = (25, 120)
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Finished:
    """Exit code and what was printed."""

    code: int
    out: str
    err: str


def call(*arguments: object) -> Finished:
    """Run `synco-fast` with these arguments, on one thread: threads that wait for busy cores take minutes."""
    out, err = io.StringIO(), io.StringIO()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr("sys.argv", ["synco-fast", *map(str, arguments)])
        patch.setenv("COLUMNS", str(_SCREEN[1]))
        patch.setenv("OMP_NUM_THREADS", "1")  # of the processes that it starts
        with pytest.raises(SystemExit) as exit_:
            main()
    torch.set_num_threads(threads)
    code = exit_.value.code
    assert isinstance(code, int)
    return Finished(code, out.getvalue(), _COLOUR.sub("", err.getvalue()))


def check_error(code: int, err: str, names: tuple[str, ...]) -> None:
    """A failure told on one screen, without a traceback, that names the culprit."""
    assert code in (1, 2), err
    assert "Traceback" not in err
    lines, columns = _SCREEN
    assert sum(max(1, -(-len(line) // columns)) for line in err.splitlines()) <= lines, err
    for name in names:
        assert name in err


def contents(folder: Path) -> dict[str, str]:
    """Every path below a folder (or the folder's absence), with a digest of each file."""
    if not folder.exists():
        return {"absent": ""}
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def one_step(config: Path, data: Path, output: Path, *overrides: str, resume: object = None) -> list[str]:
    """Arguments of a run that stops after one step; the overrides come on top."""
    settings = [f"output={output}", "trainer.max_steps=1", f"data.root={data}", *overrides]
    options = [part for setting in settings for part in ("--set", setting)]
    return ["pretrain", str(config), *options, *([] if resume is None else ["--resume", str(resume)])]


def check_refused(output: Path, *arguments: object, names: tuple[str, ...]) -> None:
    """The command fails as it should and writes nothing, whether its output folder holds something or is not there."""
    check_refused_there(output, *arguments, names=names)
    shutil.rmtree(output)
    done = call(*arguments)
    check_error(done.code, done.err, names)
    assert not output.exists()


def check_refused_there(output: Path, *arguments: object, names: tuple[str, ...]) -> None:
    """The same for an output folder that holds something, alone: for commands that take long."""
    output.mkdir()
    (output / "notes.txt").write_text("somebody's")
    before = contents(output)
    done = call(*arguments)
    check_error(done.code, done.err, names)
    assert (done.code, done.out) == (1, "")
    assert contents(output) == before
