"""Facts about a data set, from its files' headers."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from synco_fast.data.reader import Header, read_header
from synco_fast.data.samples import Index
from synco_fast.errors import UserError

_QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)
# Reading a header is mostly waiting for the disk.
_THREADS = 8
_PART = 256


def statistics(index: Index) -> dict[str, Any]:
    """Read every file's header; pixels are not decoded.

    Returns:
        images: number of files.
        classes: {class name: number of files}, empty when unlabelled.
        formats: {format: number of files}.
        height, width: {quantile: pixels} as stored, without EXIF rotation; empty if no file is readable.
        unreadable: messages, one per file whose header cannot be read.
    """
    counts = {} if index.labels is None else Counter(index.labels.tolist())
    parts = [range(start, min(start + _PART, len(index))) for start in range(0, len(index), _PART)]
    with ThreadPoolExecutor(_THREADS) as pool:
        found = [header for part in pool.map(partial(_headers, index), parts) for header in part]
    headers = [header for header in found if isinstance(header, Header)]
    unreadable = [header for header in found if isinstance(header, str)]
    return {
        "images": len(index),
        "classes": {name: counts[label] for label, name in enumerate(index.classes)},
        "formats": dict(Counter(header.format for header in headers)),
        "height": _quantiles([header.height for header in headers]),
        "width": _quantiles([header.width for header in headers]),
        "unreadable": unreadable,
    }


def _headers(index: Index, rows: range) -> list[Header | str]:
    """Each image's header, or the message that says why there is none."""
    found: list[Header | str] = []
    for i in rows:
        try:
            found.append(read_header(index.sample(i)))
        except UserError as error:
            found.append(str(error))
    return found


def _quantiles(values: list[int]) -> dict[float, float]:
    if not values:
        return {}
    return dict(zip(_QUANTILES, np.quantile(values, _QUANTILES).tolist(), strict=True))


def table(facts: dict[str, Any]) -> str:
    """`statistics` as lines to print."""
    lines = [f"images   {facts['images']}"]
    lines += [f"formats  {', '.join(f'{name} {count}' for name, count in sorted(facts['formats'].items()))}"]
    for side in ("height", "width"):
        spread = ", ".join(f"{quantile:.0%} {pixels:.0f}" for quantile, pixels in facts[side].items())
        lines.append(f"{side:<8} {spread}")
    if facts["classes"]:
        lines.append(f"classes  {len(facts['classes'])}")
        lines += [f"  {name}  {count}" for name, count in facts["classes"].items()]
    if facts["unreadable"]:
        lines.append(f"unreadable  {len(facts['unreadable'])}")
        lines += [f"  {message}" for message in facts["unreadable"]]
    return "\n".join(lines)
