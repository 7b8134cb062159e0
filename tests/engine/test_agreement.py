"""Processes that were not started alike, or whose models part, are told apart by name."""

import pytest
import torch

from synco_fast.engine.agreement import Fingerprint, _split, check_start
from synco_fast.engine.distributed import Processes
from synco_fast.engine.run import build_contrast
from synco_fast.errors import UserError
from synco_fast.methods import MomentumContrast
from tests.engine.ranks import on_ranks
from tests.engine.steps import small_config


def _flip(rows: torch.Tensor, bit: int) -> None:
    rows.flatten().view(torch.int16 if rows.element_size() == 2 else torch.int32)[-1] ^= bit


CHANGES = {
    "nothing": lambda contrast: None,
    "query encoder": lambda contrast: _flip(contrast.query_encoder.head[2].bias.data, 1),
    "key encoder": lambda contrast: _flip(contrast.key_encoder.head[0].weight.data, 1),
    "queue": lambda contrast: _flip(contrast.queue.rows, 1),
    "pointer": lambda contrast: contrast.queue.pointer.add_(1),
    "rows exchanged": lambda contrast: contrast.queue.rows.copy_(contrast.queue.rows.roll(1, 0)),
    "statistics": lambda contrast: contrast.query_encoder.backbone[1].running_mean.add_(1),
}


def told(processes: Processes) -> list[str]:
    """What each change on rank 1 alone is answered with; and on ranks 1 and 2, of which neither is most."""
    said = []
    for change in CHANGES.values():
        contrast = build_contrast(small_config(), processes)
        if processes.rank == 1:
            change(contrast)
        said.append(_answer(contrast, processes))
    return said


def _answer(contrast: MomentumContrast, processes: Processes) -> str:
    try:
        Fingerprint(contrast).check(7, processes)
    except UserError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], str]:
    """What `told` and `started` give on each of three ranks."""
    ranks = on_ranks(both, 3, tmp_path_factory.mktemp("ranks"))
    assert ranks[0] == ranks[1] == ranks[2]
    told_, started_ = ranks[0]
    return told_, started_


def test_one_changed_bit_names_the_rank(answers: tuple[list[str], str]) -> None:
    """The last bit of one number, on one of three ranks; batch norm's statistics are each rank's own."""
    found = dict(zip(CHANGES, answers[0], strict=True))
    assert found["nothing"] == found["statistics"] == ""
    for name in ("query encoder", "key encoder", "queue"):
        assert f"\n  {name}: rank 1 has other bits than most" in found[name]
        assert "after step 7" in found[name] and found[name].count("rank ") == 1
    for name in ("pointer", "rows exchanged"):
        assert "\n  queue: rank 1 has other bits than most" in found[name]


def test_of_two_neither_is_blamed() -> None:
    assert _split([5, 6]) == (5, "rank 0", [1])
    assert _split([5, 6, 6, 5]) == (5, "rank 0", [1, 2])
    assert _split([5, 6, 6]) == (6, "most", [0])


def both(processes: Processes) -> tuple[list[str], str]:
    return told(processes), started(processes)


def started(processes: Processes) -> str:
    facts = {"torch": "2.14.1", "processes on the host": "8", "data set": "100 images"}
    if processes.rank == 2:
        facts |= {"processes on the host": "4", "data set": "99 images, ü"}
    try:
        check_start(processes, facts)
    except UserError as error:
        return str(error)
    return ""


def test_processes_that_were_not_started_alike(answers: tuple[list[str], str]) -> None:
    text = answers[1]
    assert "the 3 processes cannot work together" in text
    assert "processes on the host: 4 on rank 2 (host " in text and "8 on most" in text
    assert "data set: 99 images, ü on rank 2" in text and "torch:" not in text
