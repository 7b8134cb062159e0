"""From repeated timings to figures: quantiles, and intervals of paired differences."""

from collections.abc import Sequence
from typing import Any

import numpy as np

_RESAMPLES = 10_000
_TAILS = (2.5, 97.5)


def quantiles(nanoseconds: Sequence[int]) -> dict[str, float]:
    """Median and the 20th and 80th percentile, in milliseconds."""
    p20, median, p80 = np.quantile(np.array(nanoseconds) / 1e6, (0.2, 0.5, 0.8)).tolist()
    return {"median_ms": median, "p20_ms": p20, "p80_ms": p80}


def difference(left: Sequence[int], right: Sequence[int]) -> dict[str, Any]:
    """Of timings taken in the same rounds, in nanoseconds: the median of left - right, and its 95% interval.

    The interval is the percentile bootstrap's, over rounds; the resampling is the same each time.
    """
    differences = (np.array(left) - np.array(right)) / 1e6
    rounds = np.random.default_rng(0).integers(len(differences), size=(_RESAMPLES, len(differences)))
    low, high = np.percentile(np.median(differences[rounds], axis=1), _TAILS).tolist()
    return {"median_ms": float(np.median(differences)), "low_ms": low, "high_ms": high}
