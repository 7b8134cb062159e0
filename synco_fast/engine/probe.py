"""kNN accuracy on held-out images while training goes on."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from synco_fast.config import DTYPES, Config
from synco_fast.data.index import Index, held_out
from synco_fast.data.loader import EvalLoader
from synco_fast.engine.distributed import Processes
from synco_fast.errors import UserError
from synco_fast.evaluation.features import extract
from synco_fast.evaluation.knn import knn_accuracy
from synco_fast.models.encoders import Encoder
from synco_fast.models.shuffle import all_gather_rows, broadcast_buffers


class KnnProbe:
    """Features of the training set as the bank, held-out images as queries; both shared out over the processes."""

    def __init__(self, config: Config, processes: Processes, bank: Index, held_out: Index) -> None:
        self.config, self.processes, self.bank, self.held_out = config, processes, bank, held_out
        self.on_skip: Callable[[str], object] | None = None
        self._bad: dict[str, list[int]] = {"bank": [], "held out": []}  # in this process's share

    def measure(self, encoder: nn.Module) -> dict[str, float | int]:
        """Accuracy of the encoder's backbone, with the neighbours used. All processes call it."""
        assert isinstance(encoder, Encoder)
        # Each process has batch norm statistics of its own; the main one's are the model's.
        broadcast_buffers(encoder)
        bank, bank_labels = self._features(encoder, self.bank, "bank")
        features, labels = self._features(encoder, self.held_out, "held out")
        k = min(self.config.knn.k, len(bank))
        accuracy = knn_accuracy(bank, bank_labels, features, labels, k=k, temperature=self.config.knn.temperature)
        return {"accuracy": accuracy, "k": k, "bank": len(bank), "held_out": len(features)}

    def _features(self, encoder: Encoder, index: Index, part: str) -> tuple[torch.Tensor, torch.Tensor]:
        processes = self.processes
        loader = evaluation_loader(self.config, processes, index, self._bad[part])
        loader.bad.on_skip = self.on_skip or loader.bad.on_skip
        bf16 = self.config.trainer.precision == "bf16"
        features, labels = extract(encoder.backbone, loader, device=processes.device, bf16=bf16)
        if len(features) == 0:  # as wide as those of other processes
            features = features.new_empty(0, encoder.width)
        self._bad[part] = loader.bad.found
        features, labels = (_gather(rows, len(index), processes) for rows in (features, labels))
        if len(features) == 0:
            raise UserError(f"kNN: none of the {len(index)} images in {index.root} ({part}) can be used")
        return features, labels


def evaluation_loader(config: Config, processes: Processes, index: Index, skipped: Sequence[int] = ()) -> EvalLoader:
    """This process's share of an index but for the samples skipped, prepared for evaluation as configured."""
    data = config.data
    return EvalLoader(
        index,
        batch_size=max(1, data.batch_size // processes.world_size),
        image_size=data.image_size,
        resize=data.eval_resize,
        dtype=DTYPES[data.dtype],
        augmentation=data.augmentation,
        device=processes.device,
        threads=data.threads,
        prefetch=data.prefetch,
        rank=processes.rank,
        world_size=processes.world_size,
        on_corrupt=data.on_corrupt,
        skipped=skipped,
    )


def held_out_like(bank: Index, root: Path) -> Index:
    """The held-out split of a data set whose training split is `bank`.

    Raises:
        UserError: kNN cannot work on this data: no labels, no held-out split, or other classes in it.
    """
    test = held_out(root)
    if bank.labels is None or test is None:
        raise UserError(f"{root}: kNN needs class folders in train/ and in a held-out val/ or test/ beside it")
    if bank.classes != test.classes:
        odd = sorted(set(bank.classes) ^ set(test.classes))
        raise UserError(
            f"{root}: kNN needs the same classes in {bank.root.name}/ and {test.root.name}/; only one has {odd[:5]}"
        )
    return test


def _gather(rows: torch.Tensor, total: int, processes: Processes) -> torch.Tensor:
    """Contiguous shares of unequal length, put together in order on every process."""
    if processes.world_size == 1:
        return rows
    longest = -(-total // processes.world_size)
    sizes = all_gather_rows(torch.tensor([len(rows)], device=rows.device)).tolist()
    padded = torch.cat([rows, rows.new_zeros(longest - len(rows), *rows.shape[1:])])
    parts = all_gather_rows(padded).split(longest)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
