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
    tied = (similarity == threshold) & (threshold > -torch.inf)
    # A second selection, by rule: all above the threshold first, then the tied, the lower column the earlier.
    end = similarity.shape[1]
    turn = torch.arange(end, 0, -1, dtype=torch.int32, device=similarity.device)
    key = torch.where(similarity > threshold, end + 1, torch.where(tied, turn, 0))
    taken = key.topk(n, dim=1, sorted=False)
    columns = torch.where(taken.values > 0, taken.indices, end).sort(dim=1).values
    inside = columns < end
    return torch.where(inside, columns, 0), inside.sum(dim=1, keepdim=True)
