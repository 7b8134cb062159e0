"""Weighted k-nearest-neighbour classification of frozen features (Wu et al., arXiv 1805.01978, section 3.4)."""

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK = 512


def knn_accuracy(
    bank: Tensor, bank_labels: Tensor, features: Tensor, labels: Tensor, *, k: int, temperature: float
) -> float:
    """Share of features whose class wins the vote of their k nearest neighbours in the bank.

    Each neighbour votes with exp(cosine similarity / temperature).

    Args:
        bank: (M, F) features of the training set, any scale. bank_labels: (M,) int64.
        features: (n, F), labels: (n,) int64, of the held-out set.
        k: neighbours, at most M are used.
        temperature: of the votes.
    """
    bank = F.normalize(bank.float(), dim=1)
    features = F.normalize(features.float(), dim=1)
    classes = int(torch.maximum(bank_labels.max(), labels.max())) + 1
    correct = 0
    for part, truth in zip(features.split(_CHUNK), labels.split(_CHUNK), strict=True):
        nearest = (part @ bank.T).topk(min(k, len(bank)), dim=1)
        # The largest similarity is taken off, which changes no winner and keeps the exponential finite.
        weights = ((nearest.values - nearest.values[:, :1]) / temperature).exp()
        votes = torch.zeros(len(part), classes, device=part.device)
        votes.scatter_add_(1, bank_labels[nearest.indices], weights)
        correct += int((votes.argmax(dim=1) == truth).sum())
    return correct / len(features)
