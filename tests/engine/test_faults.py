"""Faults of machines, disks and schedulers in the middle of a run, which then goes on as if nothing had been."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.command import call
from tests.conftest import SYNCO_FAST, TINY, environment
from tests.disks import mounted
from tests.engine.ranks import Launched
from tests.engine.runs import differences, final_state, pretrain_command, rows

STEPS = 24
SETTINGS = ("checkpoint.every_steps=3",)


def command(config: Path, data: Path, output: Path, *settings: str) -> list[str]:
    options = [word for setting in (*SETTINGS, *settings) for word in ("--set", setting)]
    return pretrain_command(config, data, output, *options)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="module")
def undisturbed(config: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of one run from start to end."""
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    done = call(*command(config, images, output)[len(SYNCO_FAST) :])
    assert done.code == 0, done.err
    return output


def check_same(output: Path, undisturbed: Path) -> None:
    state, expected = final_state(output), final_state(undisturbed)
    assert state["step"] == STEPS
    for side in (state, expected):  # limits and places, which change nothing else
        del side["config"]["trainer"], side["config"]["checkpoint"]
    assert differences(state, expected) == []
    assert rows(output) == rows(undisturbed)
    assert not list(output.rglob(".*.tmp"))


def test_out_of_time(config: Path, images: Path, tmp_path: Path, undisturbed: Path) -> None:
    """trainer.max_hours is over after each start's first step: three starts that get on, then one without a limit."""
    limited = command(config, images, tmp_path / "run", "trainer.max_hours=1e-9")[len(SYNCO_FAST) :]
    for step in (1, 2, 3):
        done = call(*limited)
        assert done.code == 75 and f"stopped after step {step}; go on with --resume auto" in done.err, done.err
    done = call(*command(config, images, tmp_path / "run")[len(SYNCO_FAST) :])
    assert done.code == 0, done.err
    check_same(tmp_path / "run", undisturbed)


@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_a_disk_that_fails_in_the_middle(
    fault: str, config: Path, images: Path, tmp_path: Path, undisturbed: Path
) -> None:
    """The run goes on to its end and tells of it; what was good before is there, rows included, and is gone on from."""
    size = 3 * (undisturbed / "checkpoints" / "latest.pt").stat().st_size
    with mounted(tmp_path / "disk", size + 200_000) as disk:
        output = disk.folder / "run"
        process = subprocess.Popen(
            command(config, images, output), stderr=subprocess.PIPE, text=True, env=environment()
        )
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith("step 8/"):
                if fault == "full":
                    with (disk.folder / "filler").open("wb") as filler:
                        try:
                            while True:
                                os.write(filler.fileno(), bytes(4096))
                        except OSError:
                            pass
                else:
                    disk.remount("ro")
        text = "".join(said)
        assert process.wait() == 1, text
        assert "warning: " in text and "the run goes on" in text and f"step {STEPS}/{STEPS}" in text
        assert "Traceback" not in text.replace("Exception in thread", "") or "event_file_writer" in text
        reason = "No space left on device" if fault == "full" else "Read-only file system"
        assert f"cannot write it: {reason}" in text.splitlines()[-1]
        good = final_state(output)["step"]
        assert 3 <= good < 12
        disk.remount("rw")
        (disk.folder / "filler").unlink(missing_ok=True)
        done = call(*command(config, images, output)[len(SYNCO_FAST) :])
        assert done.code == 0, done.err
        check_same(output, undisturbed)


def test_waiting_for_data(config: Path, images: Path, tmp_path: Path) -> None:
    """A file that never ends, as on a file system that hangs: the process ends and says in what, and where."""
    files = sorted(str(path) for path in (images / "train").rglob("*.jpg"))
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "list.txt").write_text("\n".join([*files[:60], str(tmp_path / "pipe.jpg")]) + "\n")
    stalled = command(config, tmp_path / "list.txt", tmp_path / "run", "trainer.stall_minutes=0.05")
    done = subprocess.run(stalled, env=environment(), capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1, done.stderr
    assert "in waiting for data, for more than trainer.stall_minutes = 0.05" in done.stderr
    assert "rank 0 of 1 has been at step " in done.stderr and "most recent call first" in done.stderr


def test_a_process_that_hangs(config: Path, images: Path, tmp_path: Path) -> None:
    """SIGSTOP to rank 1: rank 0 says that it does not answer, and ends."""
    words = command(config, images, tmp_path / "run", "trainer.stall_minutes=0.05", "trainer.epochs=1000")
    launched = Launched(words, 2)
    launched.wait_for("step 3/")
    stopped = launched.workers()[1]
    os.kill(stopped, signal.SIGSTOP)
    try:
        launched.wait_for("error: rank 0 of 2 has been at step ")
    finally:
        time.sleep(0.5)
        os.kill(stopped, signal.SIGKILL)
    code, text = launched.end()
    assert code == 1 and "rank 1 does not answer" in text, text


@pytest.mark.parametrize("mode", ["split", "shuffle"])
def test_a_process_that_is_killed(mode: str, config: Path, images: Path, tmp_path: Path) -> None:
    """SIGKILL to rank 1 of 2, once: the other says so, torchrun starts both again, and they end where two undisturbed
    ones end."""
    settings = ("trainer.epochs=3", f"bn.mode={mode}")
    launched = Launched(command(config, images, tmp_path / "killed", *settings), 2, restarts=1)
    launched.wait_for("step 8/")
    os.kill(launched.workers()[1], signal.SIGKILL)
    code, text = launched.end()
    assert code == 0, text
    assert "rank 0 of 2: another process was lost" in text or "SIGTERM" in text
    whole = Launched(command(config, images, tmp_path / "whole", *settings), 2)
    code, text = whole.end()
    assert code == 0, text
    assert differences(final_state(tmp_path / "killed"), final_state(tmp_path / "whole")) == []
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
