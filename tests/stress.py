"""`make stress`: the long counts, resumable; what they found is appended to docs/reliability.md.

Progress is kept in runs/stress/progress.json until all is done. Within a stage it is saved every 50 cases; a run with
kills of several processes and the soak are one case each, and start anew.
"""

import argparse
import collections
import datetime
import functools
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from synco_fast.files import read_json_lines, write_text_atomically
from tests import fuzz
from tests.campaign import campaign
from tests.conftest import REPOSITORY, TINY, environment, write_images
from tests.damage import HOW, Scene
from tests.engine.ranks import Launched
from tests.engine.runs import differences, final_state, pretrain_command, rows
from tests.engine.trajectories import compare

FOLDER = REPOSITORY / "runs" / "stress"
PROGRESS = FOLDER / "progress.json"
LEDGER = REPOSITORY / "docs" / "reliability.md"


class Stage:
    """Cases 0 .. count - 1 of one kind, `done` of which are behind us, with the findings so far.

    A case that fails is a finding; one that returns a text is counted under it.
    """

    def __init__(self, name: str, count: int) -> None:
        saved = json.loads(PROGRESS.read_text()).get(name, {}) if PROGRESS.exists() else {}
        self.name, self.count = name, count
        self.done, self.findings = saved.get("done", 0), saved.get("findings", [])
        self.over = saved.get("over")  # so many cases were run, and are written down
        self.outcomes = collections.Counter(saved.get("outcomes", {}))

    def run(self, case: Callable[[int], object], at_once: int = 1) -> None:
        """`case` takes the number of a case, and runs that one and the at_once - 1 after it; none if all were run."""
        if self.over == self.count:
            return
        while self.done < self.count:
            try:
                outcome = case(self.done)
                if isinstance(outcome, str):
                    self.outcomes[outcome] += 1
            except Exception as error:  # whatever goes wrong is a finding, and the count goes on
                self.findings.append(f"case {self.done}: {type(error).__name__} {str(error)[:100]!r}")
            self.done = min(self.done + at_once, self.count)
            if self.done % 50 == 0 or self.name == "kills":
                self._save()
                print(f"{self.name}: {self.done}/{self.count}, {len(self.findings)} findings", flush=True)
        self.finish()

    def finish(self) -> None:
        """Write the result down."""
        commit = _git("describe", "--always")
        if _git("status", "--porcelain", "--untracked-files=no", "--", ".", f":!{LEDGER.relative_to(REPOSITORY)}"):
            commit += "-dirty"
        happened = [f"{count}: {text}" for text, count in sorted(self.outcomes.items())]
        found = ". ".join(["; ".join(self.findings) or "none", *happened])
        row = f"| {datetime.date.today()} | {commit} | {self.name} | {self.count} | {found} |\n"
        with LEDGER.open("a", encoding="utf-8") as file:
            file.write(row)
        print(row, end="")
        self.over = self.count
        self._save()

    def _save(self) -> None:
        state = json.loads(PROGRESS.read_text()) if PROGRESS.exists() else {}
        state[self.name] = {
            "done": self.done,
            "findings": self.findings,
            "outcomes": self.outcomes,
            "over": self.over,
        }
        write_text_atomically(PROGRESS, json.dumps(state))


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    return done.stdout.strip()


class Kills:
    """One run, killed at random moments, against the same run left alone.

    Args:
        count: of the kills. processes: 1, each kill followed by a new start; or more under torchrun, which starts them
            again by itself after a random one was killed.
    """

    def __init__(self, count: int, processes: int = 1) -> None:
        self.processes = processes
        self.folder = FOLDER / f"kills-{processes}"
        name = "kills" if processes == 1 else f"kills of one of {processes} processes under torchrun"
        self.stage = Stage(name, count)
        if self.stage.done == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
        if not self.folder.exists():
            for label in range(2):
                write_images(self.folder / "images" / "train" / f"class{label}", 50, seed=label)
                write_images(self.folder / "images" / "val" / f"class{label}", 10, seed=2 + label)
        self.config = self.folder / "tiny.yaml"
        self.config.write_text(TINY)

    def run(self) -> None:
        if self.processes == 1:
            self.stage.run(lambda number: self._kill(number))
        else:
            self.stage.run(lambda number: self._kill_workers(), at_once=self.stage.count)

    def command(self, name: str) -> list[str]:
        # An epoch of 6 steps, an evaluation and a checkpoint each; long enough that every kill meets a live run.
        epochs, mode = 10 * self.stage.count, "split" if self.processes == 1 else "shuffle"
        settings = [f"trainer.epochs={epochs}", "checkpoint.every_steps=3", "knn.every_epochs=1", f"bn.mode={mode}"]
        return pretrain_command(self.config, self.folder / "images", self.folder / name, settings=settings)

    def _kill(self, number: int) -> None:
        """Kill at a random moment after the first step of this start; after the last kill, compare."""
        process = subprocess.Popen(self.command("killed"), stderr=subprocess.PIPE, text=True, env=environment())
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("step "):
                break
        time.sleep(random.Random(number).uniform(0, 6))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, f"the run ended before kill {number}"
        if number == self.stage.count - 1:
            for name in ("killed", "undisturbed"):
                subprocess.run(self.command(name), check=True, env=environment(), capture_output=True)
            self._compare()

    def _kill_workers(self) -> None:
        """Kill a random process at a random moment after the first step of each start; torchrun does the rest."""
        count, draw = self.stage.count, random.Random(self.processes)
        launched = Launched(self.command("killed"), self.processes, restarts=count)
        for number in range(count):
            launched.wait_for("step ", len(launched.said))
            time.sleep(draw.uniform(0, 6))
            alive = launched.workers()
            os.kill(draw.choice(alive), signal.SIGKILL)
            while set(alive) & set(launched.workers()):  # torchrun ends the others, too
                time.sleep(0.05)
            print(f"{self.stage.name}: {number + 1}/{count}", flush=True)
        code, text = launched.end()
        assert code == 0, text[-1000:]
        code, text = Launched(self.command("undisturbed"), self.processes).end()
        assert code == 0, text[-1000:]
        self._compare()

    def _compare(self) -> None:
        killed, undisturbed = self.folder / "killed", self.folder / "undisturbed"
        assert differences(final_state(killed), final_state(undisturbed)) == [], "states differ"
        assert rows(killed) == rows(undisturbed), "metrics differ"
        assert not list(killed.rglob(".*.tmp")), "stray temporary files"


def soak(steps: int) -> None:
    """One run of so many steps, with checkpoints and evaluations: what it holds at its end is what it held early on."""

    def run(_: int) -> None:
        folder = FOLDER / "soak"
        shutil.rmtree(folder, ignore_errors=True)
        for label in range(2):
            write_images(folder / "images" / "train" / f"class{label}", 50, seed=label)
            write_images(folder / "images" / "val" / f"class{label}", 10, seed=2 + label)
        (folder / "tiny.yaml").write_text(TINY)
        settings = [f"trainer.epochs={steps // 6 + 1}", f"trainer.max_steps={steps}", "trainer.log_every=25"]
        settings += ["checkpoint.every_epochs=10", "knn.every_epochs=10"]
        command = pretrain_command(folder / "tiny.yaml", folder / "images", folder / "run", settings=settings)
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment())
        assert process.stderr is not None
        memory, handles = [], []
        for line in process.stderr:
            if line.startswith("step "):
                memory.append(int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]))
                handles.append(len(os.listdir(f"/proc/{process.pid}/fd")))
        assert process.wait() == 0
        rates = [
            row["timing"]["images_per_second"]
            for row in read_json_lines(folder / "run" / "metrics.jsonl")
            if row["kind"] == "train"
        ]
        fifth = len(memory) // 5
        early, late = (statistics.median(part) for part in (memory[fifth : 2 * fifth], memory[-fifth:]))
        first, second = (
            statistics.quantiles(part, n=5) for part in (rates[fifth : len(rates) // 2], rates[len(rates) // 2 :])
        )
        print(
            f"resident {early} and {late} pages, handles {handles[fifth]} and {handles[-1]}, images/s {first}, {second}"
        )
        assert late <= 1.02 * early, f"resident memory grew from {early} to {late} pages"
        assert max(handles[-fifth:]) <= max(handles[fifth : 2 * fifth]), "file handles grew"
        assert statistics.median(second) >= first[0], f"images/s fell from {first} to {second} (p20, p40, p60, p80)"

    Stage(f"soak, {steps} steps", 1).run(run)


RANDOM_CALLS: dict[str, tuple[str, dict[str, str]]] = {
    "cpu backend: random calls": ("tests/ops/test_fused.py::test_random_calls", {}),
    "cuda backend in the emulator: random calls": ("tests/simt/test_infonce.py::test_random_calls", {}),
}
"""The tests that draw them by hypothesis, and with which environment."""
if torch.cuda.is_available():
    RANDOM_CALLS["cuda backend: random calls"] = ("tests/ops/test_cuda.py::test_random_calls", {})
    RANDOM_CALLS["triton backend: random calls"] = ("tests/ops/test_triton_random.py", {})
else:
    RANDOM_CALLS["triton backend in its interpreter: random calls"] = (
        "tests/ops/test_triton_random.py",
        {"TRITON_INTERPRET": "1"},
    )


def random_calls(name: str, count: int, at_once: int = 100) -> None:
    """A process runs `at_once` cases, which the number of the first one as --hypothesis-seed brings again."""
    test, variables = RANDOM_CALLS[name]

    def run(first: int) -> None:
        cases = min(at_once, count - first)
        options = ["--timeout=0", "--hypothesis-show-statistics", f"--hypothesis-seed={first}"]
        result = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", *options, test],
            cwd=REPOSITORY,
            env=environment() | {"SYNCO_FAST_CASES": str(cases)} | variables,
            capture_output=True,
            text=True,
            check=False,
        )
        passed = sum(map(int, re.findall(r"(\d+) passing", result.stdout)))
        if result.returncode or passed < cases:  # A test that is skipped passes none.
            failed = [line for line in result.stdout.splitlines() if line.startswith("E ")]
            raise AssertionError(" ".join(failed) or f"{passed} of {cases} cases passed")

    Stage(name, count).run(run, at_once)


def damaged_files(count: int) -> None:
    """A file of a run that was stopped, cut or changed at so many random places, each gone on from to the end."""
    folder = FOLDER / "damage"
    shutil.rmtree(folder, ignore_errors=True)
    scene = Scene(folder)
    for file in ("checkpoint", "metrics", "shard"):
        for how in HOW:
            Stage(f"{file} {how}", count).run(functools.partial(getattr(scene, file), how))


def slow_tests(_: int) -> None:
    """Those that `make test` leaves out: what is compiled against what is not."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "slow"]
    result = subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-500:]


def hostile_files(hostile: int) -> None:
    """So many hostile files among ten times as many good ones."""

    def run(first: int) -> None:
        print(campaign(FOLDER / "hostile", 10 * hostile, hostile))

    Stage(f"hostile files among {10 * hostile} good ones", hostile).run(run, at_once=hostile)


def trajectories(steps: int) -> None:
    """The losses of so many fast and plain steps."""
    found = [(method, precision) for method in ("moco", "mochi", "synco") for precision in ("fp32", "bf16")]
    Stage(f"fast step beside the plain one, {steps} steps", len(found)).run(
        lambda number: print(compare(*found[number], steps), flush=True)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--worker-kills", type=int, default=20, help="of one of 2 processes, and of one of 4")
    parser.add_argument("--op", type=int, default=10000, help="right calls, and wrong ones")
    parser.add_argument("--fused", type=int, default=2000, help="random calls of each fused backend")
    parser.add_argument("--config", type=int, default=10000)
    parser.add_argument("--damaged", type=int, default=2000, help="checkpoints; shards and lists")
    parser.add_argument("--files", type=int, default=200, help="checkpoints, metrics, shards; cut, and changed")
    parser.add_argument("--soak", type=int, default=5000, help="steps of one run")
    parser.add_argument("--steps", type=int, default=200, help="of the fast step beside the plain one")
    parser.add_argument("--hostile", type=int, default=500)
    arguments = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    Stage("slow tests", 1).run(slow_tests)
    Stage("op: eager against reference, float64", arguments.op).run(fuzz.op_case)
    Stage("op: changed arguments", arguments.op).run(fuzz.argument_case)
    for name in RANDOM_CALLS:
        random_calls(name, arguments.fused)
    Stage("mutated configurations", arguments.config).run(fuzz.config_case)
    for name, case in (("checkpoints", fuzz.checkpoint_case), ("shards and lists", fuzz.shard_case)):
        Stage(f"damaged {name}", arguments.damaged).run(functools.partial(case, folder=FOLDER))
    damaged_files(arguments.files)
    hostile_files(arguments.hostile)
    trajectories(arguments.steps)
    Kills(arguments.kills).run()
    soak(arguments.soak)
    for processes in (2, 4):
        Kills(arguments.worker_kills, processes).run()
    PROGRESS.unlink()


if __name__ == "__main__":
    main()
