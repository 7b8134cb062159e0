"""Two processes under torchrun do what one does, and agree with each other."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import REPOSITORY, environment
from tests.engine.ranks import TORCHRUN
from tests.engine.runs import differences


def launch(processes: int, config: Path, folder: Path, mode: str, *overrides: str) -> list[dict[str, Any]]:
    """What each rank of a worker run saved."""
    folder.mkdir()
    worker = ["-m", "tests.engine.distributed_worker", str(config), str(folder), mode, *overrides]
    command = [*TORCHRUN, f"--nproc-per-node={processes}", *worker]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    paths = [folder / f"rank-{rank}-of-{processes}.pt" for rank in range(processes)]
    return [torch.load(path, weights_only=True) for path in paths]


@pytest.mark.parametrize("mode", ["split", "shuffle", pytest.param("plain", marks=pytest.mark.slow)])
def test_ranks_agree(mode: str, images: Path, tiny: Path, tmp_path: Path) -> None:
    """After 20 steps queue and weights are the same bits on both ranks; batch norm's statistics are each rank's own."""
    steps = ["trainer.max_steps=20", f"data.root={images}", f"bn.mode={mode}", "bn.group_size=4"]
    first, second = (
        {name: value for name, value in rank["model"].items() if "running_" not in name}
        for rank in launch(2, tiny, tmp_path / "two", "steps", *steps)
    )
    assert differences(first, second) == []
    assert first["queue.pointer"] == 20 * 16 % 64
    assert not torch.equal(first["query_encoder.head.0.weight"], first["key_encoder.head.0.weight"])


def test_gradient_equals_single_process(images: Path, tiny: Path, tmp_path: Path) -> None:
    """With batch norm frozen: one global batch on 1 process, on 2, on 1 in 4 micro-batches, on 2 with keys shuffled.

    Synthetic negatives are on, so draws by global row are part of what must agree. Only the order of float32 sums
    differs; the bound is 20 roundings of the largest gradient, where a wrong row offset is off by a percent.
    """
    settings = ["negatives.warmup_epochs=0", f"data.root={images}", "bn.group_size=2"]
    (one,) = launch(1, tiny, tmp_path / "one", "gradient", *settings)
    two = launch(2, tiny, tmp_path / "two", "gradient", *settings)
    (parts,) = launch(1, tiny, tmp_path / "parts", "gradient", *settings, "trainer.accumulate=4")
    shuffled = launch(2, tiny, tmp_path / "shuffled", "gradient", *settings, "bn.mode=shuffle", "trainer.accumulate=2")
    for other in (*two, parts, *shuffled):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-6)
        for name, gradient in one["gradients"].items():
            error = (other["gradients"][name] - gradient).abs().max()
            assert error <= 20 * 2**-23 * gradient.abs().max() + 1e-9, name
        queue, expected = other["model"]["queue.rows"].float(), one["model"]["queue.rows"].float()
        assert torch.allclose(queue, expected, atol=2**-10)
