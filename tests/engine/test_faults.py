"""Faults of machines, disks and schedulers in the middle of a run, which then goes on as if nothing had been."""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.command import call
from tests.conftest import REPOSITORY, SYNCO_FAST, environment
from tests.disks import mounted
from tests.engine.ranks import Launched
from tests.engine.runs import differences, final_state, pretrain_command, rows

STEPS = 24
SETTINGS = ("checkpoint.every_steps=3",)


def command(config: Path, data: Path, output: Path, *settings: str) -> list[str]:
    return pretrain_command(config, data, output, settings=(*SETTINGS, *settings))


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


@pytest.mark.parametrize("launched", [True, False])
def test_time_counts_from_the_start_of_torchrun(launched: bool) -> None:
    """Of which this process is a later start: half a second more than it has lived is over for one, not the other."""
    code = (
        "import os, time; from synco_fast.engine.stopping import Stop, started;"
        "age = time.clock_gettime(time.CLOCK_BOOTTIME) - started(os.getpid());"
        "print(Stop(None, (age + 0.5) / 3600).asked)"
    )
    shell = ["sh", "-c", f"sleep 1; {sys.executable} -c '{code}'; exit $?"]
    variables = environment() | ({"TORCHELASTIC_RUN_ID": "x"} if launched else {})
    done = subprocess.run(shell, env=variables, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout == f"{launched}\n"


def bound_by_permissions() -> None:
    """Give up what lets root write where permissions do not (CAP_DAC_OVERRIDE), for whatever is executed next."""
    ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)  # PR_CAPBSET_DROP


def running(words: list[str], text: str) -> "subprocess.Popen[str]":
    """A run that has come to say a line that begins so."""
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment())
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith(text):
            return process
    pytest.fail(f"it ended without {text!r}")


@contextlib.contextmanager
def paused(process: "subprocess.Popen[str]") -> Iterator[None]:
    """A run that does not get on meanwhile."""
    process.send_signal(signal.SIGSTOP)
    yield
    process.send_signal(signal.SIGCONT)


def run_and_break(words: list[str], fault: Callable[[], object]) -> str:
    """A run that has something happen to it at the eighth step, and fails in the end; what it said."""
    process = subprocess.Popen(
        words, stderr=subprocess.PIPE, text=True, env=environment(), preexec_fn=bound_by_permissions
    )
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if line.startswith("step 8/"):
            with paused(process):
                fault()
    text = "".join(said)
    assert process.wait() == 1, text
    assert f"step {STEPS}/{STEPS}" in text and "warning: " in text and "the run goes on" in text
    return text


def fill(folder: Path, *descriptors: int) -> None:
    """Leave no room on the disk of a folder, nor in the last blocks of open files there."""
    with (folder / "filler").open("wb") as filler:
        for descriptor in (filler.fileno(), *descriptors):
            with contextlib.suppress(OSError):
                while os.write(descriptor, b" " * 4096):
                    pass


def test_a_disk_that_is_full(config: Path, images: Path, tmp_path: Path, undisturbed: Path) -> None:
    """The run goes on to its end and tells of it; what was good before is there, rows included, and is gone on from."""
    with mounted(tmp_path / "disk", 50_000_000) as folder:
        words = command(config, images, folder / "run")
        text = run_and_break(words, lambda: fill(folder))
        assert text.splitlines()[-1].startswith("error: ") and "No space left on device" in text.splitlines()[-1]
        assert 3 <= final_state(folder / "run")["step"] < STEPS
        (folder / "filler").unlink()
        done = call(*words[len(SYNCO_FAST) :])
        assert done.code == 0, done.err
        check_same(folder / "run", undisturbed)


def test_a_log_on_a_disk_that_is_full(config: Path, images: Path, tmp_path: Path, undisturbed: Path) -> None:
    """What cannot be said is not said, and ends nothing."""
    with mounted(tmp_path / "disk", 100_000) as disk, (disk / "log").open("w") as log:
        process = subprocess.Popen(command(config, images, tmp_path / "run"), stderr=log, text=True, env=environment())
        while "step 8/" not in (disk / "log").read_text():
            assert process.poll() is None
            time.sleep(0.02)
        with paused(process):
            fill(disk, log.fileno())
        assert process.wait() == 0 and f"step {STEPS}/" not in (disk / "log").read_text()
    check_same(tmp_path / "run", undisturbed)


def test_two_runs_in_one_folder(config: Path, images: Path, tmp_path: Path) -> None:
    """The second one goes on from the first one's checkpoints, and the first ends when it comes to its next."""
    words = command(config, images, tmp_path / "run", "trainer.epochs=1000")
    first = running(words, "step 8/")
    with paused(first):
        done = call(*words[len(SYNCO_FAST) :], "--set", "trainer.max_hours=1e-9")
    assert done.code == 75, done.err
    assert first.stderr is not None
    text = first.stderr.read()
    assert first.wait() == 1 and "another run writes there now (process " in text.splitlines()[-1], text
    step = final_state(tmp_path / "run")["step"]
    assert f"stopped after step {step};" in done.err and '"stopped"' in (tmp_path / "run" / "status.json").read_text()
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, step + 1))


def test_a_folder_made_read_only(config: Path, images: Path, tmp_path: Path, undisturbed: Path) -> None:
    output = tmp_path / "run"
    words = command(config, images, output)
    text = run_and_break(words, lambda: (output / "checkpoints").chmod(0o555))
    (output / "checkpoints").chmod(0o755)
    assert "Permission denied" in text.splitlines()[-1] and "Traceback" not in text
    assert 3 <= final_state(output)["step"] < STEPS
    done = call(*words[len(SYNCO_FAST) :])
    assert done.code == 0, done.err
    check_same(output, undisturbed)


def test_waiting_for_data(config: Path, images: Path, tmp_path: Path) -> None:
    """Files that never end, as on a file system that hangs: the process ends and says in what, and where."""
    data = shutil.copytree(images / "train", tmp_path / "data")
    words = command(config, data, tmp_path / "run", "trainer.stall_minutes=0.25", "trainer.epochs=1000")
    process = running(words, "step 1/")
    with paused(process):
        for path in data.rglob("*.jpg"):
            path.unlink()
            os.mkfifo(path)
    assert process.stderr is not None
    said = process.stderr.read()
    assert process.wait() == 1, said
    assert "in waiting for data, for more than trainer.stall_minutes = 0.25" in said
    assert "rank 0 of 1 has been at step " in said and "most recent call first" in said


def test_a_process_that_hangs(config: Path, images: Path, tmp_path: Path) -> None:
    """SIGSTOP to rank 1: rank 0 says that it does not answer, and ends."""
    words = command(config, images, tmp_path / "run", "trainer.stall_minutes=0.5", "trainer.epochs=1000")
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


@pytest.mark.parametrize("mode", ["shuffle", pytest.param("split", marks=pytest.mark.slow)])
def test_a_process_that_is_killed(mode: str, config: Path, images: Path, tmp_path: Path) -> None:
    """SIGKILL to rank 1 of 2, once: the other says so, torchrun starts both again, and they end where two undisturbed
    ones end."""
    settings = ("trainer.epochs=3", f"bn.mode={mode}")
    launched = Launched(command(config, images, tmp_path / "killed", *settings), 2, restarts=1)
    launched.wait_for("step 8/")
    os.kill(launched.workers()[1], signal.SIGKILL)
    code, text = launched.end()
    assert code == 0 and "error: rank 0 of 2: another process was lost" in text, text
    whole = Launched(command(config, images, tmp_path / "whole", *settings), 2)
    code, text = whole.end()
    assert code == 0, text
    assert differences(final_state(tmp_path / "killed"), final_state(tmp_path / "whole")) == []
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")


def test_another_number_of_processes(config: Path, images: Path, tmp_path: Path) -> None:
    """SIGUSR1 to one of two processes within an epoch: both stop at the same step, torchrun starts neither again, and
    one process goes on at the next. Every image has its place whatever the number of processes."""
    words = command(config, images, tmp_path / "run", "bn.group_size=4")
    launched = Launched(words, 2, restarts=3)
    launched.wait_for("step 8/")
    os.kill(launched.workers()[0], signal.SIGUSR1)
    code, text = launched.end()
    assert code == 1 and text.count("go on with --resume auto") == 2, text
    stopped = final_state(tmp_path / "run")["step"]
    assert 8 <= stopped < STEPS and '"stopped"' in (tmp_path / "run" / "status.json").read_text()
    done = call(*words[len(SYNCO_FAST) :])
    assert done.code == 0 and f"step {stopped + 1}/{STEPS}" in done.err, done.err
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, STEPS + 1))
    assert '"finished"' in (tmp_path / "run" / "status.json").read_text()


def test_the_others_are_not_there(config: Path, images: Path, tmp_path: Path) -> None:
    """A process of two, alone: it says whom it waited for, and ends."""
    alone = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29731"}
    words = command(config, images, tmp_path / "run", "trainer.stall_minutes=0.02")
    done = subprocess.run(words, env=environment() | alone, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "error: rank 0 of 2 cannot join the others at 127.0.0.1:29731 (MASTER_ADDR, MASTER_PORT)" in done.stderr
