"""HardNegatives: presets, derived numbers, and that each field is checked by name."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from synco_fast.ops import KINDS, HardNegatives, stat_names
from synco_fast.ops.hard import terms
from tests.ops import oracle

COUNTS = ("n_hard", *KINDS)
STRENGTHS = ("alpha_max", "beta_max", "gamma_max", "sigma", "delta", "eta")


def test_kinds_keep_the_number_that_their_draws_hang_on() -> None:
    assert {kind: number for number, kind in enumerate(KINDS)} == oracle.KIND_NUMBERS


def test_synco_preset_is_the_published_one() -> None:
    hard = HardNegatives.synco()
    assert dataclasses.astuple(hard) == (
        *(1024, 256, 256, 256, 64, 64, 64),
        *(0.5, 1.5, 1.0, 0.01, 0.01, 0.01),
        "query",
    )
    assert hard.total == 960 and hard.kinds == KINDS
    assert HardNegatives.synco(noisy=3, sigma=0.5) == HardNegatives(noisy=3, sigma=0.5)


def test_mochi_preset() -> None:
    hard = HardNegatives.mochi()
    assert (hard.n_hard, hard.mixed, hard.interpolated) == (1024, 1024, 128)
    assert (hard.alpha_max, hard.gamma_max) == (0.5, 1.0)
    assert hard.kinds == ("interpolated", "mixed") and hard.total == 1152
    other = HardNegatives.mochi(n_hard=512, mixed=7, interpolated=0)
    assert other.n_hard == 512 and other.kinds == ("mixed",) and other.total == 7


def test_none_is_moco() -> None:
    hard = HardNegatives.none()
    assert hard.total == 0 and hard.kinds == () and hard.n_hard == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_alone(kind: str) -> None:
    hard = dataclasses.replace(HardNegatives.none(), n_hard=4, **{kind: 3})
    assert hard.kinds == (kind,) and hard.total == 3
    assert {other: hard.count(other) for other in KINDS} == {other: 3 * (other == kind) for other in KINDS}


def test_it_is_a_value() -> None:
    hard = HardNegatives.synco()
    assert hash(hard) == hash(HardNegatives())
    with pytest.raises(dataclasses.FrozenInstanceError):
        hard.noisy = 1  # type: ignore[misc]


@pytest.mark.parametrize("value", [-1, 2**20 + 1, 1.0, 2.5, True, None, "3", math.nan])
@pytest.mark.parametrize("name", COUNTS)
def test_a_wrong_count_is_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be a whole number in \[0, 1048576\], got {value!r}$"):
        HardNegatives(**{name: value})


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, -math.inf, None, "0.5", 1j])
@pytest.mark.parametrize("name", STRENGTHS)
def test_a_wrong_strength_is_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must lie in .*, got "):
        HardNegatives(**{name: value})


@pytest.mark.parametrize(("name", "value"), [("alpha_max", 1.01), ("gamma_max", 1.01), ("beta_max", 0.99)])
def test_a_strength_past_its_end_is_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must lie in "):
        HardNegatives(**{name: value})


def test_the_ends_themselves_are_allowed() -> None:
    HardNegatives(alpha_max=0, beta_max=1, gamma_max=0, sigma=0, delta=0, eta=0)
    HardNegatives(alpha_max=1, beta_max=100.0, gamma_max=1, sigma=3.0, delta=3.0, eta=np.float64(3.0))


@pytest.mark.parametrize("value", ["key", "Query", None, 1])
def test_a_wrong_extrapolation_is_named(value: Any) -> None:
    with pytest.raises(ValueError, match=r'^extrapolate_from must be "query" or "negative"'):
        HardNegatives(extrapolate_from=value)


def test_synthetic_negatives_need_a_hard_set() -> None:
    with pytest.raises(ValueError, match=r"^n_hard is 0, but 960 synthetic negatives"):
        HardNegatives(n_hard=0)
    HardNegatives(4, 0, 0, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("kind", "form", "query", "parents"),
    [
        ("interpolated", "query", 0.25, (0.75,)),
        ("extrapolated", "query", 0.75, (0.25,)),
        ("extrapolated", "negative", -0.25, (1.25,)),
        ("mixed", "query", 0.0, (0.25, 0.75)),
        ("noisy", "query", 0.0, (1.0,)),
        ("perturbed", "query", 0.25, (1.0,)),
        ("adversarial", "query", 0.0, (1.0,)),
    ],
)
def test_terms_are_the_table(kind: str, form: Any, query: float, parents: tuple[float, ...]) -> None:
    assert terms(kind, 0.25, HardNegatives(extrapolate_from=form)) == (query, parents)


def test_stat_names() -> None:
    base = ("acc1", "acc5", "positive_similarity", "mass_positive", "mass_queue")
    assert stat_names(HardNegatives.none()) == base
    assert stat_names(HardNegatives.mochi()) == (
        *(*base, "mass_interpolated", "mass_mixed"),
        *("synthetic_share", "hard_similarity"),
    )
