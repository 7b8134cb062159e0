"""kNN accuracy on held-out images: while training goes on, and of a checkpoint."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from synco_fast.config import DTYPES, Data
from synco_fast.data.index import Index, held_out
from synco_fast.data.loader import EvalLoader
from synco_fast.engine.distributed import Processes, reduce_max, reduce_sum
from synco_fast.engine.features import extract, features_of
from synco_fast.engine.knn import NearestNeighbours, merged, winners
from synco_fast.errors import UserError
from synco_fast.models.encoders import Encoder
from synco_fast.models.shuffle import all_gather_rows, broadcast_buffers

Votes = list[tuple[int, float]]

# Held-out images whose features are held; more take another pass over the bank. 1 GiB at 2048 features.
_HELD_OUT = 2**17


class KnnProbe:
    """Features of the training set as the bank, held-out images as queries; both shared out over the processes.

    Args:
        data: how images are prepared. bf16: the backbone runs under autocast.
        processes: this one among them.
        bank, held_out: labelled images of the same classes.
    """

    def __init__(self, data: Data, processes: Processes, bank: Index, held_out: Index, *, bf16: bool) -> None:
        self.data, self.processes, self.bank, self.held_out, self.bf16 = data, processes, bank, held_out, bf16
        self.on_skip: Callable[[str], object] | None = None
        self.on_images: Callable[[int], object] = lambda images: None
        self._bad: dict[str, list[int]] = {"bank": [], "held out": []}  # in this process's share

    def measure(self, encoder: Encoder, votes: Votes) -> tuple[list[float], dict[str, int]]:
        """Accuracy of the encoder's backbone. All processes call it.

        Args:
            votes: k and temperature of each accuracy wanted.

        Returns:
            Accuracies in that order, and the numbers of images used: `bank`, `held_out`.

        Raises:
            UserError: no image of one of the two sets can be used, or features are not finite.
        """
        # Each process has batch norm statistics of its own; the main one's are the model's.
        broadcast_buffers(encoder)
        correct, rows, count = [0] * len(votes), 0, 0
        for start in range(0, len(self.held_out), _HELD_OUT):
            part = self.held_out.take(range(start, min(start + _HELD_OUT, len(self.held_out))))
            queries, labels = self._queries(encoder, part, start)
            similarity, classes, rows = self._neighbours(encoder, queries, max(k for k, _ in votes))
            for i, (k, temperature) in enumerate(votes):
                if len(labels):
                    found = winners(similarity, classes, k=k, temperature=temperature)
                    correct[i] += int((found == labels).sum())
            count += len(labels)
        if count == 0:
            raise self._unusable(self.held_out, "held out")
        return [number / count for number in correct], {"bank": rows, "held_out": count}

    @property
    def images(self) -> int:
        """How many images a measurement goes through, those of all processes."""
        return len(self.held_out) + len(self.bank) * -(-len(self.held_out) // _HELD_OUT)

    def _queries(self, encoder: Encoder, part: Index, start: int) -> tuple[Tensor, Tensor]:
        """Features and labels of a part of the held-out images, those of all processes."""
        known = [i - start for i in self._bad["held out"] if start <= i < start + len(part)]
        loader = self._loader(part, known)
        device = self.processes.device
        features, labels = extract(encoder.backbone, self._counted(loader), device=device, bf16=self.bf16)
        if len(features) == 0:  # as wide as those of other processes
            features = features.new_empty(0, encoder.width)
        self._bad["held out"] += [start + i for i in loader.bad.found if i not in known]
        gathered_features, gathered_labels = (_gather(rows, len(part), self.processes) for rows in (features, labels))
        return gathered_features, gathered_labels

    def _neighbours(self, encoder: Encoder, queries: Tensor, k: int) -> tuple[Tensor, Tensor, int]:
        """Similarities and classes (n, k) of each query's neighbours in the whole bank, and the size of that."""
        neighbours = NearestNeighbours(queries, k)
        loader = self._loader(self.bank, self._bad["bank"])
        for features, labels in features_of(
            encoder.backbone, self._counted(loader), device=self.processes.device, bf16=self.bf16
        ):
            neighbours.add(features, labels)
        self._bad["bank"] = loader.bad.found
        rows = int(reduce_sum(torch.tensor(neighbours.rows, device=queries.device)))
        if rows == 0:
            raise self._unusable(self.bank, "bank")
        similarity, classes = neighbours.best()
        if self.processes.world_size > 1:
            k = min(k, rows)
            # A share may have fewer rows than k: what fills it up has no say.
            short = k - similarity.shape[1]
            similarity, classes = F.pad(similarity, (0, short), value=-torch.inf), F.pad(classes, (0, short))
            similarity, classes = (all_gather_rows(share.T.contiguous()).T for share in (similarity, classes))
            similarity, classes = merged(similarity, classes, k)
        if bool(reduce_max((~neighbours.finite).float())):
            raise UserError("kNN: the backbone's features are not finite, so nothing can be said of these weights")
        return similarity, classes, rows

    def _loader(self, index: Index, skipped: Sequence[int]) -> EvalLoader:
        loader = evaluation_loader(self.data, self.processes, index, skipped)
        loader.bad.on_skip = self.on_skip or loader.bad.on_skip
        return loader

    def _counted(self, loader: EvalLoader) -> Iterator[tuple[Tensor, Tensor | None]]:
        for images, labels in loader:
            yield images, labels
            self.on_images(len(images))

    def _unusable(self, index: Index, part: str) -> UserError:
        return UserError(f"kNN: none of the {len(index)} images in {index.root} ({part}) can be used")


def evaluation_loader(data: Data, processes: Processes, index: Index, skipped: Sequence[int] = ()) -> EvalLoader:
    """This process's share of an index but for the samples skipped, prepared for evaluation as configured."""
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


def held_out_like(bank: Index, root: Path, what: str = "kNN") -> Index:
    """The held-out split of a data set whose training split is `bank`, for what is named.

    Raises:
        UserError: this data cannot be used: no labels, no held-out split, or other classes in it.
    """
    test = held_out(root)
    if bank.labels is None or test is None:
        raise UserError(f"{root}: {what} needs class folders in train/ and in a held-out val/ or test/ beside it")
    if bank.classes != test.classes:
        odd = sorted(set(bank.classes) ^ set(test.classes))
        raise UserError(
            f"{root}: {what} needs the same classes in {bank.root.name}/ and {test.root.name}/; only one has {odd[:5]}"
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
