"""Pretraining methods: momentum contrast, with the negatives that make it MoCo v2, MoCHi or SynCo."""

from synco_fast.methods.contrast import MomentumContrast, negatives_at

__all__ = ["MomentumContrast", "negatives_at"]
