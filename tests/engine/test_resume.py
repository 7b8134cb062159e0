"""A run that was killed, resumed and killed again ends in the state of one that was not."""

import random
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from synco_fast.data.index import Index, scan
from tests.command import call
from tests.conftest import SYNCO_FAST, environment
from tests.engine.runs import differences, final_state, kill_after, pretrain_command, rows, run_until
from tests.formats import FORMATS

STEPS = 24


@pytest.fixture(scope="module")
def undisturbed(config: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of one run from start to end."""
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    command = pretrain_command(config, images, output, settings=["knn.every_epochs=2"])
    subprocess.run(command, check=True, env=environment(), capture_output=True)
    return output


def check_same(output: Path, undisturbed: Path) -> None:
    state = final_state(output)
    assert state["step"] == STEPS
    assert differences(state, final_state(undisturbed)) == []
    assert rows(output) == rows(undisturbed)
    assert not list(output.rglob(".*.tmp"))


def test_killed_at_random_steps(images: Path, tiny: Path, tmp_path: Path, undisturbed: Path) -> None:
    """SIGKILL at 5 random steps of 24, with checkpoints every 4 steps and epochs of 6; the last resumption recomputes
    activations."""
    output = tmp_path / "run"
    command = pretrain_command(tiny, images, output, "--set", "knn.every_epochs=2", "--set", "checkpoint.every_steps=4")
    steps = sorted(random.Random(0).sample(range(2, STEPS), 5))
    for step in steps:
        kill_after(command, step)
    # As a run does that was out of memory.
    command += ["--set", "speed.recompute=true"]
    subprocess.run(command, check=True, env=environment(), capture_output=True)
    # When checkpoints are written, and whether activations are kept, changes nothing else.
    state, expected = final_state(output), final_state(undisturbed)
    for side in (state, expected):
        del side["config"]["checkpoint"], side["config"]["speed"]
    assert differences(state, expected) == []
    assert rows(output) == rows(undisturbed)
    assert not list(output.rglob(".*.tmp"))


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)]
)
def test_stopped_by_signal(number: int, images: Path, tiny: Path, tmp_path: Path, undisturbed: Path) -> None:
    """The step is finished, the checkpoint is of that very step, the exit code is 75, and the run goes on."""
    command = pretrain_command(tiny, images, tmp_path / "run", "--set", "knn.every_epochs=2")
    code, output = run_until(command, 8, number)
    assert code == 75, output
    assert "--resume auto" in output and "Traceback" not in output
    stopped_at = final_state(tmp_path / "run")["step"]
    assert 8 <= stopped_at < STEPS
    subprocess.run(command, check=True, env=environment(), capture_output=True)
    check_same(tmp_path / "run", undisturbed)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(FORMATS["tar_with_numbers"], id="WebDataset"),
        pytest.param(FORMATS["imagenet"], id="TFRecord", marks=pytest.mark.slow),
    ],
)
def test_killed_while_reading_shards(
    make: Callable[[Index, Path], Path], images: Path, tiny: Path, tmp_path: Path
) -> None:
    """SIGKILL twice in the middle of an epoch of 6 steps, with checkpoints in the middle of it."""
    data = make(scan(images), tmp_path / "shards")
    short = ("--set", "trainer.max_steps=10", "--set", "checkpoint.every_steps=2")
    whole = pretrain_command(tiny, data, tmp_path / "whole", *short)
    subprocess.run(whole, check=True, env=environment(), capture_output=True)
    killed = pretrain_command(tiny, data, tmp_path / "killed", *short)
    for step in (3, 9):
        kill_after(killed, step)
    subprocess.run(killed, check=True, env=environment(), capture_output=True)
    assert differences(final_state(tmp_path / "killed"), final_state(tmp_path / "whole")) == []
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")


def test_the_random_start_is_a_checkpoint(images: Path, tiny: Path, tmp_path: Path) -> None:
    """Of no steps: asked for again it stays what it is, and a run goes on from it as if it had begun itself."""
    for name, steps in (("run", 0), ("run", 0), ("run", 2), ("whole", 2)):
        command = pretrain_command(tiny, images, tmp_path / name, "--set", f"trainer.max_steps={steps}")
        done = call(*command[len(SYNCO_FAST) :])
        assert done.code == 0, done.err
        assert final_state(tmp_path / name)["step"] == steps
        assert [row["step"] for row in rows(tmp_path / name)] == list(range(1, steps + 1))
    assert differences(final_state(tmp_path / "run"), final_state(tmp_path / "whole")) == []
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_in_the_fast_step(images: Path, tiny: Path, tmp_path: Path) -> None:
    """Compiled encoders and a low-precision twin, which a new process compiles and makes anew: the same bits."""
    fast = ("model.arch=resnet10_narrow", "speed.compile=true", "speed.key_twin=true", "trainer.precision=bf16")
    options = [word for key in (*fast, "trainer.max_steps=9", "checkpoint.every_steps=2") for word in ("--set", key)]
    whole = pretrain_command(tiny, images, tmp_path / "whole", *options)
    subprocess.run(whole, check=True, env=environment(), capture_output=True)
    killed = pretrain_command(tiny, images, tmp_path / "killed", *options)
    kill_after(killed, 5)
    subprocess.run(killed, check=True, env=environment(), capture_output=True)
    assert differences(final_state(tmp_path / "killed"), final_state(tmp_path / "whole")) == []
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
