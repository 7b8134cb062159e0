"""The op's boundary: whatever does not fit is refused with a message that names the argument."""

import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from synco_fast.ops import backends, dispatch, infonce, synthesize
from tests.ops.cases import BACKENDS, batch, everything

Arguments = dict[str, Any]


def arguments() -> Arguments:
    q, k, queue = (x.float() for x in batch(seed=70))
    return {"q": q, "k": k, "queue": queue, "hard": everything()}


def with_labels(**changes: Any) -> Callable[[Arguments], Arguments]:
    return lambda a: (
        {"labels": torch.zeros(5, dtype=torch.int64), "queue_labels": torch.zeros(40, dtype=torch.int64)} | changes
    )


# What is changed, as a function of the right arguments; the exception; and how its message begins.
WRONG: dict[str, tuple[Callable[[Arguments], Arguments], type[Exception], str]] = {
    "q 1-d": (lambda a: {"q": a["q"][0]}, ValueError, r"q must have 2 dimensions .*got shape \(16,\)"),
    "q 3-d": (lambda a: {"q": a["q"][None]}, ValueError, "q must have 2 dimensions"),
    "k 1-d": (lambda a: {"k": a["k"][0]}, ValueError, "k must have 2 dimensions"),
    "queue 3-d": (lambda a: {"queue": a["queue"][None]}, ValueError, "queue must have 2 dimensions"),
    "k rows": (lambda a: {"k": a["k"][:4]}, ValueError, r"k must have q's shape \(5, 16\), got \(4, 16\)"),
    "k columns": (
        lambda a: {"k": a["k"][:, :8]},
        ValueError,
        r"k must have q's shape \(5, 16\), got \(5, 8\)",
    ),
    "queue columns": (
        lambda a: {"queue": a["queue"][:, :8]},
        ValueError,
        r"queue must have q's 16 columns, got",
    ),
    "q empty": (lambda a: {"q": a["q"][:0], "k": a["k"][:0]}, ValueError, "q must have at least one row"),
    "queue empty": (lambda a: {"queue": a["queue"][:0]}, ValueError, "queue must have at least one row"),
    "no columns": (lambda a: {n: a[n][:, :0] for n in ("q", "k", "queue")}, ValueError, "q "),
    "q integer": (lambda a: {"q": a["q"].long()}, TypeError, "q must be float16, .* got torch.int64"),
    "k complex": (lambda a: {"k": a["k"].cfloat()}, TypeError, "k must be float16, .* got torch.complex64"),
    "queue integer": (
        lambda a: {"queue": a["queue"].char()},
        TypeError,
        "queue must be float16, .* got torch.int8",
    ),
    "queue float8": (
        lambda a: {"queue": a["queue"].to(torch.float8_e4m3fn)},
        TypeError,
        "queue must be float16, .* got torch.float8",
    ),
    "k device": (lambda a: {"k": a["k"].to("meta")}, ValueError, "k must be on [a-z]+'s device cpu, got meta"),
    "queue device": (
        lambda a: {"queue": a["queue"].to("meta")},
        ValueError,
        "queue must be on [a-z]+'s device cpu, got meta",
    ),
    "n_hard": (
        lambda a: {"hard": everything(41)},
        ValueError,
        "n_hard must be at most the queue's 40 rows, got 41",
    ),
    "temperature zero": (lambda a: {"temperature": 0.0}, ValueError, "temperature must be > 0 and finite, got 0"),
    "temperature negative": (
        lambda a: {"temperature": -0.2},
        ValueError,
        "temperature must be > 0 and finite, got -0.2",
    ),
    "temperature nan": (lambda a: {"temperature": math.nan}, ValueError, "temperature must be > 0 and finite, got nan"),
    "temperature infinite": (lambda a: {"temperature": math.inf}, ValueError, "temperature must be "),
    "seed negative": (lambda a: {"seed": -1}, ValueError, r"seed must lie in \[0, 2\^63\), got -1"),
    "seed too large": (lambda a: {"seed": 2**63}, ValueError, r"seed must lie in \[0, 2\^63\)"),
    "row_offset negative": (lambda a: {"row_offset": -1}, ValueError, r"row_offset must lie in \[0, 2\^32\)"),
    "row_offset too large": (
        lambda a: {"row_offset": 2**32},
        ValueError,
        r"row_offset must lie in \[0, 2\^32\)",
    ),
    "step float": (lambda a: {"step": 1.5}, TypeError, "step must be an int"),
    "step float tensor": (
        lambda a: {"step": torch.tensor(1.0)},
        TypeError,
        "step must be an int or an int64",
    ),
    "step int32 tensor": (
        lambda a: {"step": torch.tensor(1, dtype=torch.int32)},
        TypeError,
        "step must be an int",
    ),
    "step vector": (lambda a: {"step": torch.tensor([1, 2])}, TypeError, "step must be an int or an int64"),
    "step device": (
        lambda a: {"step": torch.tensor(1, device="meta")},
        ValueError,
        "step must be on [a-z]+'s device cpu, got meta",
    ),
    "seed float": (lambda a: {"seed": 1.5}, TypeError, "seed must "),
    "row_offset float": (lambda a: {"row_offset": 1.5}, TypeError, "row_offset must "),
    "labels alone": (
        lambda a: {"labels": torch.zeros(5, dtype=torch.int64)},
        ValueError,
        "labels and queue_labels go together",
    ),
    "queue_labels alone": (
        lambda a: {"queue_labels": torch.zeros(40, dtype=torch.int64)},
        ValueError,
        "labels and queue_labels go together",
    ),
    "labels length": (
        with_labels(labels=torch.zeros(4, dtype=torch.int64)),
        ValueError,
        r"labels must be int64 of shape \(5,\), got torch.int64 \(4,\)",
    ),
    "labels 2-d": (
        with_labels(labels=torch.zeros(5, 1, dtype=torch.int64)),
        ValueError,
        "labels must be int64 of",
    ),
    "labels dtype": (
        with_labels(labels=torch.zeros(5)),
        ValueError,
        "labels must be int64 .*got torch.float32",
    ),
    "labels device": (
        with_labels(labels=torch.zeros(5, dtype=torch.int64, device="meta")),
        ValueError,
        "labels must be on [a-z]+'s device cpu, got meta",
    ),
    "queue_labels length": (
        with_labels(queue_labels=torch.zeros(5, dtype=torch.int64)),
        ValueError,
        r"queue_labels must be int64 of shape \(40,\), got torch.int64 \(5,\)",
    ),
    "queue_labels device": (
        with_labels(queue_labels=torch.zeros(40, dtype=torch.int64, device="meta")),
        ValueError,
        "queue_labels must be on [a-z]+'s device cpu, got meta",
    ),
}


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize(("change", "error", "message"), WRONG.values(), ids=WRONG.keys())
def test_infonce_names_the_argument(
    change: Callable[[Arguments], Arguments], error: type[Exception], message: str, backend: str
) -> None:
    right = arguments()
    with pytest.raises(error, match=f"^{message}"):
        infonce(**right | change(right), backend=backend)


@pytest.mark.parametrize("name", [n for n in WRONG if not n.startswith(("k", "temperature", "labels", "queue_labels"))])
def test_synthesize_names_the_argument(name: str) -> None:
    change, error, message = WRONG[name]
    right = arguments()
    wrong = right | change(right)
    del wrong["k"]
    with pytest.raises(error, match=f"^{message}"):
        synthesize(**wrong)


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(ValueError, match=r"^unknown backend 'egaer': expected auto or one of reference, eager, "):
        infonce(**arguments(), backend="egaer")


def test_a_backend_works_or_says_why_not() -> None:
    states = backends()
    assert {"reference", "eager", "cpu", "triton", "cuda"} <= states.keys()
    for name, state in states.items():
        if state == "ok":
            device = "cuda" if name in ("triton", "cuda") else "cpu"
            q, k, queue = (x.to(device) for x in batch(dim=64))
            assert torch.isfinite(infonce(q, k, queue.half(), hard=everything(), backend=name).loss)
        else:
            with pytest.raises(RuntimeError) as caught:
                infonce(**arguments(), backend=name)
            assert name in str(caught.value) and state in str(caught.value) and len(state) > 10


def test_the_table_of_backends_is_a_copy() -> None:
    backends().clear()
    assert backends()["eager"] == "ok"


def test_auto_logs_its_choice_once(caplog: pytest.LogCaptureFixture) -> None:
    dispatch._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="synco_fast"):
        for _ in range(3):
            infonce(**arguments())
            infonce(**arguments() | {"queue": arguments()["queue"].double()})
    assert [record.getMessage() for record in caplog.records] == [
        "backend auto on cpu: cpu",
        "backend auto on cpu: eager; not cpu: queue must be float16, bfloat16 or float32, got torch.float64",
    ]


def test_auto_takes_what_the_fastest_backend_does_not() -> None:
    """A float64 queue, a temperature below 0.02, the class oracle: all are eager's."""
    right = arguments()
    for change in ({"queue": right["queue"].double()}, {"temperature": 0.019}, with_labels()(right)):
        auto, eager = (infonce(**right | change, backend=backend) for backend in ("auto", "eager"))
        assert torch.equal(auto.loss, eager.loss)


DEBUG_CASES = """
import json, sys
import torch
from synco_fast.ops import HardNegatives, infonce, synthesize

FAULTS = {"nan": float("nan"), "inf": float("inf"), "long": 1.02, "short": 0.98, "zero": 0}

def rows(n, dtype):
    torch.manual_seed(n)
    return torch.nn.functional.normalize(torch.randn(n, 16), dim=1).to(dtype)

def message(function, *inputs):
    try:
        function(*inputs, hard=HardNegatives(4, 2, 2, 2, 2, 2, 2))
    except ValueError as error:
        return str(error)

found = {}
for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
    right = [rows(5, dtype), rows(6, dtype)[:5], rows(40, dtype)]
    found[f"right {dtype}"] = message(infonce, *right)
    for i, name in enumerate(("q", "k", "queue")):
        for fault, factor in FAULTS.items():
            wrong = [x.clone() for x in right]
            wrong[i][3] *= factor
            found[f"{name} {fault} {dtype}"] = message(infonce, *wrong)
            if name != "k":
                found[f"{name} {fault} {dtype} synthesize"] = message(synthesize, wrong[0], wrong[2])
json.dump(found, sys.stdout)
"""


def test_rows_are_looked_at_under_the_debug_flag() -> None:
    """NaN, infinite, 2 % too long or short, zero: refused with the tensor and the row; rounded unit rows are not.

    In a process of its own, since the flag is read once.
    """
    environment = {**os.environ, "SYNCO_FAST_DEBUG": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", DEBUG_CASES], env=environment, capture_output=True, text=True, check=True
    )
    found = json.loads(result.stdout)
    assert len(found) == 4 + 4 * 5 * (3 + 2)
    for case, message in found.items():
        name = case.split()[0]
        if name == "right":
            assert message is None, case
        else:
            assert message is not None and message.startswith(f"{name} must have unit rows: row 3 "), case


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_are_not_looked_at_without_the_flag(backend: str) -> None:
    right = arguments()
    right["q"][2] *= 3
    assert torch.isfinite(infonce(**right, backend=backend).loss)
    right["q"][2, 3] = math.nan
    assert infonce(**right, backend=backend).loss.isnan()


@pytest.mark.parametrize(
    "extreme", [{"seed": 2**63 - 1}, {"row_offset": 2**32 - 5}, {"step": 2**32 - 1}, {"temperature": 1e-3}]
)
def test_the_ends_of_the_ranges_are_allowed(extreme: Arguments) -> None:
    losses = [infonce(**arguments() | {"hard": everything(40)}, **extreme, backend=b).loss for b in BACKENDS]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-4)
