"""The random cases of `make stress`, fewer of them."""

import pytest

from tests import fuzz


@pytest.mark.parametrize("start", range(0, 100, 25))
def test_op_cases(start: int) -> None:
    for number in range(start, start + 25):
        fuzz.op_case(number)


def test_config_cases() -> None:
    loaded = [fuzz.config_case(number) for number in range(300)]
    assert 0 < sum(loaded) < len(loaded), "mutations that always or never load would test nothing"
