"""Random calls of the `triton` backend, small ones: the interpreter takes milliseconds for a tile."""

from hypothesis import Phase, given, settings

from tests.ops.random_calls import FULL, Case, calls, cases
from tests.ops.triton_runs import check, here

pytestmark = here


# A failure is not made smaller: that would take minutes.
@settings(max_examples=cases(40), deadline=None, phases=(Phase.reuse, Phase.generate))
@given(case=calls(room=2**26, synthetic=80) if FULL else calls(queue_rows=2000, room=2**22, synthetic=80))
def test_random_calls(case: Case) -> None:
    check(*case.operands(), **case.arguments, ties=1)
