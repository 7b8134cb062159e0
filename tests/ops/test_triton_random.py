"""Random calls of the `triton` backend, small ones: the interpreter takes milliseconds for a tile."""

from hypothesis import Phase, given, settings

from tests.ops.random_calls import FULL, Case, calls, cases
from tests.ops.triton_runs import check, here

pytestmark = here


SIZES = {"room": 2**25} if FULL else {"room": 2**21, "queue_rows": 2000}


# A failure is not made smaller: that would take minutes.
@settings(max_examples=cases(30), deadline=None, derandomize=not FULL, phases=(Phase.reuse, Phase.generate))
@given(case=calls(synthetic=80, **SIZES))
def test_random_calls(case: Case) -> None:
    check(*case.operands(), **case.arguments, ties=1)
