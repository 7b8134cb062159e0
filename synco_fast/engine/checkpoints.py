"""Checkpoints: everything a run needs to go on as if it had never stopped, in one file that is whole or absent."""

import contextlib
import io
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from synco_fast.config import Config, parse
from synco_fast.config_text import flatten, listing
from synco_fast.errors import UserError
from synco_fast.files import write_atomically

LATEST = "latest.pt"
"""A link to the newest one."""
_STEP, _EPOCH = re.compile(r"step-(\d+)\.pt"), re.compile(r"epoch-(\d+)\.pt")
_DICTS = ("config", "data", "loader", "model", "optimizer", "meter", "rng")
_ENTRIES = {"step": int} | dict.fromkeys(_DICTS, dict)

# Keys that may differ when a run goes on: where things are, how long it lasts, and what changes results by rounding at
# most. So a run that a machine cannot go on with as it was can go on in another way.
_FREE = {
    "output",
    "data.root",
    "data.augmentation",
    "data.threads",
    "data.prefetch",
    "data.on_corrupt",
    "trainer.max_steps",
    "trainer.max_hours",
    "trainer.skip_nonfinite",
    "trainer.stall_minutes",
    "trainer.log_every",
    "trainer.deterministic",
    "speed.channels_last",
    "speed.compile",
    "speed.cuda_graph",
    "speed.key_stream",
    "speed.key_twin",
    "speed.recompute",
    "knn.every_epochs",
    "knn.k",
    "knn.temperature",
    "checkpoint.every_steps",
    "checkpoint.every_epochs",
    "checkpoint.every_minutes",
    "checkpoint.recent",
    "checkpoint.recent_hours",
    "checkpoint.keep_every",
}


def folder(output: Path) -> Path:
    return output / "checkpoints"


def step_name(step: int) -> str:
    """Of the checkpoint after so many steps."""
    return f"step-{step:08d}.pt"


def step_of(path: Path) -> int | None:
    """The steps in a checkpoint's name; None: it is named otherwise."""
    found = _STEP.fullmatch(path.name)
    return int(found[1]) if found else None


def epoch_name(epoch: int) -> str:
    """Of a checkpoint that is kept for good after so many epochs."""
    return f"epoch-{epoch:04d}.pt"


def write(path: Path, state: Any) -> None:
    """Write tensors and plain values as torch.save does, atomically.

    Raises:
        UserError: it cannot be written.
    """
    # torch.save to a file turns a full disk into an error of its own that says nothing of it.
    content = io.BytesIO()
    torch.save(state, content)
    write_atomically(path, lambda file: file.write(content.getbuffer()))


def in_folder(output: Path) -> bool:
    """Whether there are checkpoints of a run, or a link to one."""
    names = (path.name for path in folder(output).iterdir()) if folder(output).is_dir() else ()
    return any(name == LATEST or _STEP.fullmatch(name) or _EPOCH.fullmatch(name) for name in names)


def newest(output: Path, warn: Callable[[str], object]) -> tuple[Path, dict[str, Any]] | None:
    """The run's newest checkpoint that can be read, and what it holds; None: there is none at all.

    Those before the newest are taken only where that is damaged, or its link is gone, and it is told.

    Raises:
        UserError: about the newest, if none of them can be read.
    """
    latest = folder(output) / LATEST
    if not in_folder(output):
        return None
    try:
        return latest, read(latest)
    except UserError as error:
        last = step_of(Path(os.path.realpath(latest)))
        steps = {found: path for path in latest.parent.iterdir() if (found := step_of(path)) is not None}
        before = [steps[step] for step in sorted(steps, reverse=True) if last is None or step < last]
        for path in [*before, *_epochs_back(latest.parent)]:
            with contextlib.suppress(UserError):
                content = read(path)
                if last is not None and content.get("step", 0) > last:
                    continue  # of what was done before the run went back
                warn(f"warning: {error}. Going on from the one before, {path}, in its place")
                return path, content
        raise


def _epochs_back(folder: Path) -> list[Path]:
    """Checkpoints that are kept for good, the latest first."""
    epochs = {int(found[1]): path for path in folder.iterdir() if (found := _EPOCH.fullmatch(path.name))}
    return [epochs[epoch] for epoch in sorted(epochs, reverse=True)]


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint of ours on the CPU, without running anything in it.

    Raises:
        UserError: not there, damaged, or not one of ours.
    """
    return checked(read(path), path)


def checked(state: dict[str, Any], path: Path) -> dict[str, Any]:
    """What was read from `path`, which must be a whole checkpoint of ours.

    Raises:
        UserError: naming what it lacks.
    """
    wrong = [name for name, kind in _ENTRIES.items() if not isinstance(state.get(name), kind)]
    if wrong:
        raise UserError(f"{path}: not a checkpoint of synco-fast: it lacks {', '.join(wrong)}")
    nameless = [name for name in state["model"] if not isinstance(name, str)]
    if nameless:
        raise UserError(
            f"{path}: not a checkpoint of synco-fast: its model names a tensor {nameless[0]!r:.40}, expected text"
        )
    return state


def is_ours(state: dict[str, Any]) -> bool:
    """Whether what was read is meant to be a checkpoint of synco-fast."""
    return all(name in state for name in ("config", "model", "meter"))


def read(path: Path) -> dict[str, Any]:
    """What torch.save wrote, of anybody's, on the CPU: tensors and plain values. Anything else is refused, not run.

    Raises:
        UserError: not there, damaged, or not a dict of such.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()  # torch.load does not look at the checksums
            if damaged is not None:
                raise zipfile.BadZipFile(damaged)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: cannot read the checkpoint: {error.strerror}") from error
    except Exception as error:  # whatever the damage happens to run into; torch's text advises to run what is inside
        refused = re.search(r"GLOBAL ([\w.]{1,100})", str(error))
        if refused:
            raise UserError(
                f"{path}: holds more than tensors and plain values, a {refused[1]} among them, which is not run here; "
                f"where you trust the file, load it with PyTorch and save its state_dict alone"
            ) from error
        raise UserError(f"{path}: not a readable checkpoint: it is damaged or cut short") from error
    if not isinstance(state, dict):
        raise UserError(f"{path}: not a checkpoint: it holds a {type(state).__name__}, expected a dict of tensors")
    return state


def saved_config(state: dict[str, Any], path: Path) -> Config:
    """The configuration a checkpoint was written under."""
    return parse(state["config"], str(path))


def check_same_run(state: dict[str, Any], path: Path, config: Config, data: dict[str, Any]) -> None:
    """Refuse to go on with a run that would not be the same one.

    Raises:
        UserError: listing the keys that differ, or that the data set is another.
    """
    # A key that is newer than the checkpoint was at its default.
    before, now = flatten(Config().model_dump()) | flatten(state["config"]), flatten(config.model_dump())
    changed = [
        f"{key} is {now.get(key)!r}, was {before.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if key not in _FREE and before.get(key) != now.get(key)
    ]
    if state["data"] != data:
        changed.append(
            f"the data set has {data['samples']} images, digest {data['digest'][:12]}; "
            f"it had {state['data'].get('samples')}, digest {str(state['data'].get('digest'))[:12]}"
        )
    if changed:
        raise listing(f"{path}: cannot resume, this is another run (start it in another output folder)", changed)
