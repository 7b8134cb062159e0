"""Weighted k-nearest-neighbour classification of frozen features (Wu et al., arXiv 1805.01978, section 3.4).

The bank goes by in batches and is never held: what stays is each query's k best so far.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_QUERIES, _ROWS = 1024, 4096  # similarities of so many queries and rows of the bank exist at a time


class NearestNeighbours:
    """The k rows of a bank that are most similar to each query, by cosine, of all rows added so far.

    Args:
        queries: (n, F) features, any scale.
        k: neighbours of each; fewer while the bank is smaller.

    Attributes:
        rows: number of rows added.
        finite: bool scalar on the device: the lengths of all queries and rows so far are finite numbers.
    """

    def __init__(self, queries: Tensor, k: int) -> None:
        self.finite = torch.ones((), dtype=torch.bool, device=queries.device)
        self._queries = self._unit(queries)
        self._k = k
        self._similarity = queries.new_empty(len(queries), 0, dtype=torch.float32)
        self._labels = queries.new_empty(len(queries), 0, dtype=torch.int64)
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self.rows = 0

    def add(self, rows: Tensor, labels: Tensor) -> None:
        """More of the bank: (m, F) features of any scale, and their classes (m,) int64."""
        self._waiting.append((rows, labels))
        self.rows += len(rows)
        if sum(len(rows) for rows, _ in self._waiting) >= _ROWS:
            self._merge()

    def best(self) -> tuple[Tensor, Tensor]:
        """Similarities (n, k), in descending order, and classes (n, k) of the neighbours."""
        self._merge()
        return self._similarity, self._labels

    def _unit(self, rows: Tensor) -> Tensor:
        rows = rows.float()
        self.finite &= rows.norm(dim=1).isfinite().all()
        return F.normalize(rows, dim=1)

    def _merge(self) -> None:
        if not self._waiting:
            return
        rows, labels = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting = []
        for some_rows, some_labels in zip(rows.split(_ROWS), labels.split(_ROWS), strict=True):
            some_rows = self._unit(some_rows)
            parts = [
                merged(
                    torch.cat([similarity, queries @ some_rows.T], dim=1),
                    torch.cat([known, some_labels.expand(len(queries), -1)], dim=1),
                    self._k,
                )
                for queries, similarity, known in zip(
                    self._queries.split(_QUERIES),
                    self._similarity.split(_QUERIES),
                    self._labels.split(_QUERIES),
                    strict=True,
                )
            ]
            self._similarity, self._labels = (torch.cat(part) for part in zip(*parts, strict=True))


def merged(similarity: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k most similar of candidates (n, m), in descending order, with their classes."""
    best = similarity.topk(min(k, similarity.shape[1]), dim=1)
    return best.values, labels.gather(1, best.indices)


def winners(similarity: Tensor, labels: Tensor, *, k: int, temperature: float) -> Tensor:
    """The class (n,) that wins each query's vote; each neighbour votes with exp(cosine similarity / temperature).

    Args:
        similarity, labels: (n, m), in descending order; the first k vote, or all m if they are fewer.
        k: neighbours. temperature: of the votes.
    """
    similarity, labels = similarity[:, :k], labels[:, :k]
    # The largest similarity is taken off, which changes no winner and keeps the exponential finite.
    weights = ((similarity - similarity[:, :1]).double() / temperature).exp()
    classes = int(labels.max()) + 1
    found = []
    for some_weights, some_labels in zip(weights.split(_QUERIES), labels.split(_QUERIES), strict=True):
        votes = some_weights.new_zeros(len(some_weights), classes)
        found.append(votes.scatter_add_(1, some_labels, some_weights).argmax(dim=1))
    return torch.cat(found)


def knn_accuracy(
    bank: Tensor, bank_labels: Tensor, features: Tensor, labels: Tensor, *, k: int, temperature: float
) -> float:
    """Share of features whose class wins the vote of their k nearest neighbours in the bank.

    Args:
        bank: (M, F) features of the training set, any scale. bank_labels: (M,) int64.
        features: (n, F), labels: (n,) int64, of the held-out set.
        k: neighbours, at most M are used.
        temperature: of the votes.
    """
    neighbours = NearestNeighbours(features, k)
    neighbours.add(bank, bank_labels)
    predicted = winners(*neighbours.best(), k=k, temperature=temperature)
    return int((predicted == labels).sum()) / len(labels)
