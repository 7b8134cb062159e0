"""The demo through the command line, as far as its first evaluation; `make demo` runs it whole."""

import json
import signal
from pathlib import Path

from synco_fast.data.index import scan
from synco_fast.data.procedural import CLASSES
from synco_fast.demo import demo_config, measure_baselines
from synco_fast.engine.probe import held_out_like
from tests.conftest import SYNCO_FAST
from tests.engine.runs import final_state, rows, run_until


def test_makes_images_measures_baselines_and_trains(tmp_path: Path) -> None:
    """Interrupted after 46 steps it leaves a run to go on with, and says how."""
    output = tmp_path / "demo"
    code, said = run_until([*SYNCO_FAST, "demo", "--output", str(output)], 46, signal.SIGINT)
    assert code == 75 and "the same command goes on" in said, said
    bank = scan(output / "data")
    assert len(bank) == 3000 and set(bank.classes) == set(CLASSES)
    accuracy = json.loads((output / "baselines.json").read_text())["accuracy"]
    assert accuracy["guessing"] == 0.1 and all(0.05 < value < 0.6 for value in accuracy.values())
    assert final_state(output)["step"] >= 46 and rows(output)[0]["kind"] == "train"


def test_baselines_are_kept_until_what_they_are_of_changes(images: Path, tmp_path: Path) -> None:
    config = demo_config(tmp_path, images)
    bank = scan(images)
    held_out = held_out_like(bank, images)
    path = tmp_path / "baselines.json"
    first = measure_baselines(config, bank, held_out)
    path.write_text(path.read_text().replace('"guessing": 0.5', '"guessing": 0.25'))
    assert measure_baselines(config, bank, held_out)["accuracy"]["guessing"] == 0.25
    again = measure_baselines(config.model_copy(update={"seed": 1}), bank, held_out)
    assert again["accuracy"]["guessing"] == 0.5 and again["accuracy"] != first["accuracy"]
