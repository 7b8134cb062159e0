"""`synco-fast demo`: from nothing to a report that shows SynCo learning from JPEG files."""

import json
import shlex
import sys
import time
from datetime import timedelta
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from synco_fast import doctor
from synco_fast.config import Config, load
from synco_fast.data.grid import save_grid
from synco_fast.data.index import Index, scan
from synco_fast.data.order import epoch_order
from synco_fast.data.procedural import write_demo_set
from synco_fast.data.recipes import RECIPES
from synco_fast.engine import checkpoints
from synco_fast.engine.distributed import Processes, choose_device
from synco_fast.engine.probe import evaluation_loader, held_out_like
from synco_fast.engine.run import build_contrast, pretrain
from synco_fast.engine.weights import query_encoder
from synco_fast.errors import Interrupted
from synco_fast.evaluation.baselines import knn_baselines
from synco_fast.evaluation.report import baseline_rows, knn_rows, read_run, write_report
from synco_fast.files import write_text_atomically

_GRID_ROWS = 6


def run(output: Path) -> None:
    """Write the demo's data set, pretrain on it and report; what an earlier call finished is not done again.

    Args:
        output: folder for the data, the run and `report.html`.

    Raises:
        UserError: the folder cannot be written, or holds another run.
        Interrupted: by SIGTERM or SIGINT; the same call goes on.
    """
    root = output / "data"
    _say(f"images: {root}")
    write_demo_set(root)
    config = demo_config(output, root)
    bank = scan(root)
    held_out = held_out_like(bank, root)
    measure_baselines(config, bank, held_out)
    if not (checkpoints.folder(output) / checkpoints.LATEST).exists():
        _record_environment(output)
    _say("pretraining")
    try:
        pretrain(config, resume="auto")
    except Interrupted as stop:
        raise Interrupted("the demo was stopped and its state is saved; the same command goes on from there") from stop
    recipe = RECIPES[config.data.recipe]
    views = output / "views.png"
    save_grid(bank, views, n=_GRID_ROWS, image_size=config.data.image_size, recipe=recipe, seed=config.seed)
    report = write_report(output)
    print(_summary(output))
    print(f"report: {report}")


def demo_config(output: Path, root: Path) -> Config:
    """The configuration `demo.yaml` that comes with the package, at this place."""
    with as_file(files("synco_fast.configs") / "demo.yaml") as path:
        config = load(path)
    data = config.data.model_copy(update={"root": str(root)})
    return config.model_copy(update={"output": str(output), "data": data})


def measure_baselines(config: Config, bank: Index, held_out: Index) -> dict[str, Any]:
    """kNN accuracy without training, on the data and the random start of `config`; kept in `baselines.json`.

    Returns:
        `accuracy`, by the names of `knn_baselines` and `guessing`; and `of`, which says what they were measured on.
    """
    path = Path(config.output) / "baselines.json"
    of = {"config": config.model_dump(), "bank": bank.digest, "held_out": held_out.digest}
    if path.is_file():
        known = json.loads(path.read_text(encoding="utf-8"))
        if known["of"] == of:
            return known
    _say("measuring kNN accuracy without training")
    device = choose_device(config.trainer.device)
    alone = Processes(0, 1, device)
    start = build_contrast(config, alone).state_dict()
    shuffled = bank.take(epoch_order(len(bank), config.seed, epoch=0).tolist())
    accuracy = knn_baselines(
        query_encoder({"model": start}, config).backbone.to(device),
        *(evaluation_loader(config.data, alone, index) for index in (bank, held_out, shuffled)),
        k=config.knn.k,
        temperature=config.knn.temperature,
        device=device,
        bf16=config.trainer.precision == "bf16",
    )
    result = {"accuracy": {"guessing": 1 / len(bank.classes), **accuracy}, "of": of}
    write_text_atomically(path, json.dumps(result, indent=1))
    return result


def _say(stage: str) -> None:
    print(stage, file=sys.stderr, flush=True)


def _record_environment(output: Path) -> None:
    """Say with what the run was started: a report may be drawn again much later, and elsewhere."""
    environment = {
        "command": shlex.join(["synco-fast", "demo", "--output", str(output)]),
        "started": time.strftime("%Y-%m-%d %H:%M %Z"),
        "machine": doctor.text(),
    }
    write_text_atomically(output / "environment.json", json.dumps(environment, indent=1))


def _summary(output: Path) -> str:
    """The kNN table and the pace, as lines of text."""
    finished = read_run(output)
    table = baseline_rows(finished) + knn_rows(finished)
    width = max(len(name) for name, _ in table)
    lines = ["", f"{'features':<{width}}  kNN accuracy"]
    lines += [f"{name:<{width}}  {value:>12.1%}" for name, value in table]
    lines += [
        "",
        f"training: {timedelta(seconds=round(finished.training_seconds))}, {finished.images_per_second:.0f} images/s",
    ]
    return "\n".join(lines)
