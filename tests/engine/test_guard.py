"""A run whose loss blows up stops by itself, says where, and spoils nothing."""

import json
from collections.abc import Callable
from pathlib import Path

import torch

from synco_fast.engine import checkpoints
from synco_fast.engine.guard import NonFiniteGuard
from tests.engine.runs import pretrain_command


def test_latches_the_first_bad_step() -> None:
    guard = NonFiniteGuard(1, torch.device("cpu"))
    fine, bad = torch.tensor(1.0), torch.tensor(torch.nan)
    for step, (loss, norm) in enumerate([(fine, fine), (fine, bad * 0 + torch.inf), (bad, bad), (fine, fine)]):
        guard.watch(loss, norm, torch.tensor(step), torch.tensor([float(step)]))
        assert float(guard.skip) == (step >= 1)
    assert guard.first_bad_step() == 1
    assert guard.values.tolist() == [1.0]


def test_a_run_that_diverges(images: Path, tiny: Path, tmp_path: Path, synco_fast: Callable[..., object]) -> None:
    """The rate overflows the weights at the first step; the host looks at the fifth."""
    output = tmp_path / "run"
    options = ["--set", "optim.lr=1e38", "--set", "trainer.log_every=5"]
    command = pretrain_command(tiny, images, output, *options)
    done = synco_fast(*command[3:])
    assert done.returncode == 1, done.stderr  # type: ignore[attr-defined]
    assert "not finite at step" in done.stderr and "Traceback" not in done.stderr  # type: ignore[attr-defined]
    (evidence_file,) = output.glob("nonfinite-step-*.json")
    evidence = json.loads(evidence_file.read_text())
    assert 0 < evidence["step"] < 5 and str(evidence["step"]) in evidence_file.name
    assert len(evidence["files"]) == 16 and (images / "train" / evidence["files"][0]).is_file()
    assert not (checkpoints.folder(output) / checkpoints.LATEST).exists()
