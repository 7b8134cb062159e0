"""The random cases of `make stress`, fewer of them."""

from pathlib import Path

import pytest

from tests import fuzz
from tests.damage import HOW, Scene


@pytest.mark.parametrize("start", range(0, 100, 25))
def test_op_cases(start: int) -> None:
    for number in range(start, start + 25):
        fuzz.op_case(number)


def test_argument_cases() -> None:
    taken = [fuzz.argument_case(number) for number in range(200)]
    assert 0 < sum(taken) < len(taken)


def test_config_cases() -> None:
    loaded = [fuzz.config_case(number) for number in range(300)]
    assert 0 < sum(loaded) < len(loaded), "mutations that always or never load would test nothing"


def test_checkpoint_cases(tmp_path: Path) -> None:
    loaded = [fuzz.checkpoint_case(number, tmp_path) for number in range(150)]
    assert 0 < sum(loaded) < len(loaded)


def test_shard_cases(tmp_path: Path) -> None:
    loaded = [fuzz.shard_case(number, tmp_path) for number in range(150)]
    assert 0 < sum(loaded) < len(loaded)


def test_a_file_of_a_run_that_is_damaged(tmp_path: Path) -> None:
    scene = Scene(tmp_path / "scene")
    for how in HOW:
        assert scene.checkpoint(how, 0).startswith("told; went on from the one before")
        assert scene.metrics(how, 0)  # its timings, and so the place, are others each time
    assert "went on once it was mended; the same bits" in scene.shard("cut", 0)


def test_what_a_pickle_executes_is_noticed() -> None:
    with fuzz.Executions() as executed:
        exec("1 + 1")
    assert len(executed.events) == 1 and executed.events[0].startswith("exec ")
