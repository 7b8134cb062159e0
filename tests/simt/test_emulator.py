"""The emulator that runs CUDA kernels on the CPU: it does what CUDA does, and it catches what kernels do wrong.

A GPU is not needed and not used. selftest.cu and selftest_half.cu hold the assertions; built by nvcc and run on a GPU,
they tell whether hardware agrees.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.simt.build import VARIANTS, build, compile_for_gpus, why_not

FOLDER = Path(__file__).parent
SCHEDULES = ["fwd", "rev", "rand:1", "greedy:1"]

RACE = "WARNING: ThreadSanitizer: data race"
OVERFLOW = "ERROR: AddressSanitizer: heap-buffer-overflow"
POISONED = "ERROR: AddressSanitizer: use-after-poison"
WRONG = "wrong result"

# The mistakes of planted.cu: a variant that must catch it, and what that says.
CAUGHT = [
    ("no_barrier_after_wait", "plain", WRONG),
    ("no_barrier_after_wait", "threads", RACE),
    ("no_wait", "plain", WRONG),
    ("no_barrier_before_reuse", "threads", RACE),
    ("no_syncwarp", "threads", RACE),
    ("no_atomic", "threads", RACE),
    ("no_grid_sync", "plain", WRONG),
    ("no_grid_sync", "threads", RACE),
    ("no_zeroing", "plain", WRONG),
    ("block_misses_grid_sync", "plain", "DEADLOCK"),
    ("shared_write_past_end", "plain", "wrote outside a shared array of 256 bytes"),
    ("shared_write_past_end", "sanitized", OVERFLOW),
    ("shared_read_past_end", "sanitized", OVERFLOW),
    ("global_write_past_end", "plain", "written outside of global memory"),
    ("global_write_past_end", "sanitized", OVERFLOW),
    ("global_store_past_end", "plain", "outside of every cudaMalloc"),
    ("shuffle_in_branch", "plain", "DEADLOCK"),
    ("shuffle_with_partial_mask", "plain", "only the full mask"),
    ("barrier_in_branch", "plain", "barrier divergence"),
    ("mma_in_branch", "plain", "DEADLOCK"),
    ("misaligned_row", "plain", "not 16-byte aligned"),
    ("misaligned_load", "plain", "not aligned to its 16 bytes"),
    ("load_from_host", "plain", "outside of every cudaMalloc"),
    ("copies_left_at_exit", "plain", "1 cp.async copies under way"),
    ("second_arena_without_barrier", "plain", "no barrier between two SharedArenas"),
    ("array_of_former_arena", "plain", WRONG),
    ("array_of_former_arena", "sanitized", POISONED),
    ("signed_overflow", "sanitized", "runtime error: signed integer overflow"),
    ("endless_loop", "plain", "the time is up"),
    ("host_reads_device", "sanitized", POISONED),
    ("too_many_blocks", "plain", "too many blocks in cooperative launch"),
    ("shared_not_allowed", "plain", "60000 bytes of shared memory, 49152 allowed"),
    ("shared_not_launched_with", "plain", "2324 bytes taken, 2308 launched with"),
]

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


def run(
    source: str, variant: str, *arguments: str, schedule: str = "fwd", seconds: int = 100
) -> subprocess.CompletedProcess[str]:
    program = build([FOLDER / source], variant)
    environment = {**os.environ, "SIMT_SCHED": schedule, "SIMT_TIMEOUT": str(seconds)}
    return subprocess.run(
        [str(program), *arguments], capture_output=True, text=True, env=environment, timeout=200, check=False
    )


RUNS = [*(("plain", schedule) for schedule in SCHEDULES), ("sanitized", "fwd"), ("threads", "fwd")]


@pytest.mark.parametrize(
    ("source", "variant", "schedule"),
    [*(("selftest.cu", *how) for how in RUNS), ("selftest_half.cu", "plain", "fwd")],
)
def test_primitives_do_what_cuda_says(source: str, variant: str, schedule: str) -> None:
    done = run(source, variant, schedule=schedule)
    assert (done.returncode, done.stdout) == (0, "passed: 0 failures\n"), done.stdout + done.stderr


@pytest.mark.parametrize(("variant", "schedule"), RUNS)
def test_a_correct_kernel_passes(variant: str, schedule: str) -> None:
    done = run("planted.cu", variant, "none", schedule=schedule)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(("bug", "variant", "evidence"), CAUGHT)
def test_a_mistake_is_caught(bug: str, variant: str, evidence: str) -> None:
    done = run("planted.cu", variant, bug, seconds=1 if bug == "endless_loop" else 100)
    assert done.returncode != 0
    assert evidence in done.stderr


def test_every_planted_mistake_is_tested() -> None:
    planted = set(run("planted.cu", "plain").stdout.split())
    assert planted == {"none"} | {bug for bug, _, _ in CAUGHT}
    assert {variant for _, variant, _ in CAUGHT} == set(VARIANTS)


def test_an_unknown_schedule_is_refused() -> None:
    done = run("planted.cu", "plain", "none", schedule="random")
    assert done.returncode == 70 and "rand:N" in done.stderr


def test_nothing_is_built_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.simt.build.RUNTIME", ())  # which takes seconds, and which this program does not need
    source, cache = tmp_path / "source.cu", tmp_path / "cache"
    source.write_text("int main() {}")
    program = build([source], "plain", cache=cache)
    first = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert len(first) == 2
    assert build([source], "plain", cache=cache) == program
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == first
    (tmp_path / "header.h").write_text("")
    assert build([source], "plain", cache=cache) != program
    assert build([source], "plain", flags=["-DX"], cache=cache) != program


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc: not compiled for GPUs")
@pytest.mark.parametrize("source", ["selftest.cu", "selftest_half.cu"])
def test_the_gateway_compiles_for_gpus(source: str) -> None:
    assert compile_for_gpus(FOLDER / source, (80, 120)).stat().st_size
