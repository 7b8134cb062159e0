"""Everything that is promised of bad files, over one data set of any size: `make stress` runs 500 among 5,000."""

import shutil
import subprocess
import time
from pathlib import Path

import torch

from synco_fast.data.index import scan
from synco_fast.data.loader import TrainLoader
from synco_fast.data.order import epoch_order
from synco_fast.data.recipes import RECIPES
from synco_fast.data.verify import verify
from tests.conftest import TINY, environment
from tests.engine.runs import differences, final_state, kill_after, pretrain_command, rows
from tests.hostile import write_hostile

BATCH = 16  # of TINY


def campaign(folder: Path, good: int, hostile: int) -> dict[str, float]:
    """Verify; train under `fail`; go through two epochs under `skip`; kill a run in its first and resume it.

    Returns:
        Figures to report. Raises AssertionError where a promise is not kept.
    """
    shutil.rmtree(folder, ignore_errors=True)
    names = write_hostile(folder / "data", good, hostile)
    index = scan(folder / "data")
    bad = {i for i, file in enumerate(index.files) if file in names}
    assert len(bad) == len(names) and len(index) == good + hostile

    start = time.perf_counter()
    found = set(verify(index).faults)
    figures = {"bad": len(bad), "verify: images per second": len(index) / (time.perf_counter() - start)}
    assert found == bad, f"verify disagrees on {sorted(found ^ bad)}"

    (folder / "tiny.yaml").write_text(TINY)
    order = epoch_order(len(index), 0, 0).tolist()
    first = next(sample for sample in order if sample in bad)
    command = pretrain_command(folder / "tiny.yaml", folder / "data", folder / "failed")
    failed = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert failed.returncode == 1 and f"error: image file {index.path(first)} " in failed.stderr, failed.stderr[-300:]

    loader = TrainLoader(
        index,
        batch_size=BATCH,
        image_size=32,
        recipe=RECIPES["moco_v2"],
        seed=0,
        device=torch.device("cpu"),
        threads=1,
        prefetch=2,
        on_corrupt="skip",
    )
    loader.bad.on_skip = lambda text: None
    start, batch = time.perf_counter(), next(loader)
    for epoch in range(2):
        seen = []
        while batch.epoch == epoch:
            seen += batch.samples.tolist()
            batch = next(loader)
        unused = len(index) - len(bad) - len(seen)
        figures[f"skip: seconds of epoch {epoch}"] = time.perf_counter() - start
        figures[f"skip: good files unused in epoch {epoch}"] = unused
        assert not bad & set(seen) and len(set(seen)) == len(seen), f"a bad file or a repeated one in epoch {epoch}"
        assert unused < BATCH
        start = time.perf_counter()
    loader.close()
    _kill_and_resume(folder, steps=(len(index) - len(bad)) // BATCH)
    return figures


def _kill_and_resume(folder: Path, steps: int) -> None:
    settings = ["data.on_corrupt=skip", f"trainer.max_steps={steps}", f"checkpoint.every_steps={max(1, steps // 10)}"]
    settings += ["optim.momentum=0"]
    options = [part for setting in settings for part in ("--set", setting)]
    killed, undisturbed = (
        pretrain_command(folder / "tiny.yaml", folder / "data", folder / name, *options)
        for name in ("killed", "undisturbed")
    )
    kill_after(killed, steps // 2)
    assert final_state(folder / "killed")["loader"]["skipped"][0], "nothing had been skipped before the kill"
    for command in (killed, undisturbed):
        subprocess.run(command, check=True, env=environment(), capture_output=True)
    assert differences(final_state(folder / "killed"), final_state(folder / "undisturbed")) == [], "states differ"
    assert rows(folder / "killed") == rows(folder / "undisturbed"), "metrics differ"
