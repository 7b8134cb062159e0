"""That processes agree: on what they are asked to do before they begin, on the model and the queue as they go on."""

import json
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from synco_fast.config_text import listing
from synco_fast.engine.distributed import Processes, gather_numbers
from synco_fast.methods import MomentumContrast
from synco_fast.models.shuffle import all_gather_rows


def check_start(processes: Processes, facts: Mapping[str, str]) -> None:
    """Refuse processes that were not started alike. All of them call it.

    Args:
        facts: of this process, each of which all must have the same, by what they are called.

    Raises:
        UserError: on all of them, naming the ranks and hosts that differ from most.
    """
    said = {**facts, "host": socket.gethostname()}
    numbers = gather_numbers(list(json.dumps(said).encode()), processes.device)
    everybody = [json.loads(bytes(row)) for row in numbers]
    problems = []
    for name in facts:
        usual, most, others = _split([row[name] for row in everybody])
        for rank in others:
            place = f"rank {rank} (host {everybody[rank]['host']})"
            problems.append(f"{name}: {everybody[rank][name]} on {place}, {usual} on {most}")
    if problems:
        raise listing(f"the {processes.world_size} processes cannot work together; start them alike", problems)


class Fingerprint:
    """Of what must be the same bits on every process: weights and queue. (Batch norm's statistics are each one's own.)

    Args:
        contrast: the model, whose tensors stay where they are.
    """

    def __init__(self, contrast: MomentumContrast) -> None:
        buffers = dict(contrast.queue.named_buffers())
        self._parts = {
            "query encoder": [parameter.detach() for parameter in contrast.query_encoder.parameters()],
            "key encoder": [parameter.detach() for parameter in contrast.key_encoder.parameters()],
            "queue": list(buffers.values()),
        }

    def check(self, step: int, processes: Processes) -> None:
        """Compare all processes; all of them call it, and wait for it.

        Raises:
            UserError: on all of them, naming what differs and where.
        """
        if processes.world_size == 1:
            return
        mine = torch.stack([torch.stack([_sum_of_bits(rows) for rows in part]).sum() for part in self._parts.values()])
        table = all_gather_rows(mine[None]).T.tolist()
        problems = []
        for name, sums in zip(self._parts, table, strict=True):
            _, most, others = _split(sums)
            problems += [f"{name}: rank {rank} has other bits than {most}" for rank in others]
        if problems:
            raise listing(
                f"after step {step} the processes no longer have the same model: no checkpoint is written of it; go on "
                f"with --resume auto, and where it happens again, without the machine that differs from most",
                problems,
            )


def _split(values: Sequence[Any]) -> tuple[Any, str, list[int]]:
    """The value of more than half, or else of the first; who has it, in words; and the places of all others."""
    usual, count = Counter(values).most_common(1)[0]
    usual, who = (usual, "most") if 2 * count > len(values) else (values[0], "rank 0")
    return usual, who, [i for i, value in enumerate(values) if value != usual]


def _sum_of_bits(rows: Tensor) -> Tensor:
    """A number that a changed bit and exchanged rows change: int64, as integers wrap around."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()]
    sums = rows.reshape(len(rows) if rows.ndim else 1, -1).view(whole).sum(dim=1, dtype=torch.int64)
    return (sums * torch.arange(1, 2 * len(sums), 2, device=rows.device)).sum()
