"""What a step sends: counted, and as the loopback device of a network namespace counts it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.scaling import can_isolate, config_of, parser
from bench.traffic import model, sent
from tests.conftest import REPOSITORY


def test_counted_bytes_are_those_on_the_wire(tmp_path: Path) -> None:
    """On 2 processes, for the modes that send something for batch norm; headers and control messages are within 5%."""
    output = tmp_path / "rows.jsonl"
    words = ["--processes", "2", "--modes", "shuffle,sync", "--steps", "3", "--samples", "16", "--size", "32"]
    command = [sys.executable, "-m", "bench.scaling", *words, "--arch", "resnet10_narrow", "--output", str(output)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = {row["bn_mode"]: row for row in map(json.loads, output.read_text().splitlines())}
    assert list(rows) == ["shuffle", "sync"] and "shuffle   2" in done.stdout
    for row in rows.values():
        assert row["median_ms"] > 0 and row["n"] == 3 and row["processes"] == 2
    if not can_isolate():
        assert all(row["wire_bytes"] is None for row in rows.values())
        pytest.skip("network namespaces need root")
    for mode, row in rows.items():
        assert row["wire_bytes"] == pytest.approx(sum(row["sent_bytes"].values()), rel=0.05), mode


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_shuffling_moves_no_more_than_what_changes_place(processes: int) -> None:
    """(W - 1) / W of the whole batch's images over all processes, and not one image more."""
    options = parser().parse_args(["--samples", "32", "--size", "64"])
    config = config_of(options, "shuffle", processes)
    moved = processes * sent(config, processes)["images"]
    batch = config.data.batch_size * 3 * 64 * 64 * 4
    assert moved == pytest.approx(batch * (processes - 1) / processes)


def test_the_model_s_table() -> None:
    """ResNet-50 with its head has 27.97 million parameters, whose gradients a ring sends twice but for a share."""
    lines = model([2, 8]).splitlines()
    assert len(lines) == 4 and lines[0].startswith("| GPUs | split | shuffle | sync |")
    assert lines[2].split("|")[5].strip() == f"{27_966_656 * 4 * 2 * 1 / 2 / 1e6:.1f}"
