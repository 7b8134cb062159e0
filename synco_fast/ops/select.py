"""The hard set: the N most similar rows of the queue, exactly, ties at the threshold to the lower index."""

import torch
from torch import Tensor


def hardest(similarity: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The hard set of each row in canonical order.

    Ties are settled by rule, not by the sort of the day, and nothing is read back by the host. Entries of -inf
    (same-class negatives of the class oracle) are never taken, so a row may hold fewer than n.

    Args:
        similarity: (B, K).
        n: size of the hard set, 1 <= n <= K.

    Returns:
        (B, n) int64 column indices, ascending, those past the row's size 0; and (B, 1) int64, the row's size.
    """
    threshold = similarity.topk(n, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
    above = similarity > threshold
    tied = (similarity == threshold) & (threshold > -torch.inf)
    room = n - above.sum(dim=1, keepdim=True)
    taken = above | (tied & (tied.cumsum(dim=1) <= room))
    # Column j goes to place (number of taken columns before it); what is not taken goes to a spare place n.
    place = torch.where(taken, taken.cumsum(dim=1) - 1, n)
    columns = torch.arange(similarity.shape[1], device=similarity.device).expand_as(place)
    chosen = columns.new_zeros(similarity.shape[0], n + 1).scatter_(1, place, columns)[:, :n]
    return chosen, taken.sum(dim=1, keepdim=True)
