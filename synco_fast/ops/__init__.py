"""The op of this project, usable on its own: InfoNCE with a queue and synthetic hard negatives."""

from synco_fast.ops.api import enqueue, infonce, synthesize
from synco_fast.ops.dispatch import backends
from synco_fast.ops.hard import KINDS, HardNegatives
from synco_fast.ops.result import InfoNCE, SyntheticSet, stat_names

__all__ = [
    "KINDS",
    "HardNegatives",
    "InfoNCE",
    "SyntheticSet",
    "backends",
    "enqueue",
    "infonce",
    "stat_names",
    "synthesize",
]
