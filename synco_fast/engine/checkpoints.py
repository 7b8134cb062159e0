"""Checkpoints: everything a run needs to go on as if it had never stopped, in one file that is whole or absent."""

import os
from pathlib import Path
from typing import Any

import torch

from synco_fast.config import Config, parse
from synco_fast.errors import UserError
from synco_fast.files import sync_folder, write_atomically

LATEST = "latest.pt"
_KEYS = {"config", "step", "data", "model", "optimizer", "meter", "rng"}

# Keys that may differ when a run goes on: where things are, how long it lasts, and what changes no number.
_FREE = {
    "output",
    "data.root",
    "data.threads",
    "data.prefetch",
    "trainer.max_steps",
    "trainer.log_every",
    "knn.every_epochs",
    "knn.k",
    "knn.temperature",
    "checkpoint.every_steps",
    "checkpoint.every_epochs",
    "checkpoint.keep_every",
}


def folder(output: Path) -> Path:
    return output / "checkpoints"


def save(output: Path, state: dict[str, Any], *, keep_as_epoch: int | None) -> None:
    """Replace `latest.pt`; with `keep_as_epoch`, keep it under that epoch's name for good, too."""
    latest = folder(output) / LATEST
    write_atomically(latest, lambda file: torch.save(state, file))
    if keep_as_epoch is None:
        return
    kept = latest.with_name(f"epoch-{keep_as_epoch:04d}.pt")
    link = latest.with_name(f".{kept.name}.tmp")
    link.unlink(missing_ok=True)
    os.link(latest, link)
    link.replace(kept)
    sync_folder(kept.parent)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint of ours on the CPU, without running anything in it.

    Raises:
        UserError: not there, damaged, or not one of ours.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the damage happens to run into
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise UserError(
            f"{path}: not a readable checkpoint (damaged, cut short, or of another kind): {reason}"
        ) from error
    if not isinstance(state, dict) or not state.keys() >= _KEYS:
        raise UserError(f"{path}: not a checkpoint of synco-fast: expected the entries {', '.join(sorted(_KEYS))}")
    return state


def saved_config(state: dict[str, Any], path: Path) -> Config:
    """The configuration a checkpoint was written under."""
    return parse(state["config"], str(path))


def check_same_run(state: dict[str, Any], path: Path, config: Config, data: dict[str, Any]) -> None:
    """Refuse to go on with a run that would not be the same one.

    Raises:
        UserError: listing the keys that differ, or that the data set is another.
    """
    before, now = _flatten(state["config"]), _flatten(config.model_dump())
    changed = [
        f"{key} is {now.get(key)!r}, was {before.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if key not in _FREE and before.get(key) != now.get(key)
    ]
    if state["data"] != data:
        changed.append(
            f"the data set has {data['samples']} images, digest {data['digest'][:12]}; "
            f"it had {state['data']['samples']}, digest {state['data']['digest'][:12]}"
        )
    if changed:
        raise UserError(
            "\n  ".join(
                [f"{path}: cannot resume, this is another run (start it with another --set output=...)", *changed]
            )
        )


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(
            _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        )
    return flat
