"""Advice names only keys that are not set, can be set, and help."""

from typing import Any

import pytest

from synco_fast.config import key_paths, parse
from synco_fast.engine.speed import Speed
from synco_fast.profiling import page
from synco_fast.profiling.advice import Setting, advice

NOTHING = dict.fromkeys(
    ("channels_last", "compile", "cuda_graph", "key_stream", "key_twin", "recompute", "apex"), False
)
SLOW = {"trainer": {"precision": "fp32"}, "queue": {"dtype": "fp32"}, "bn": {"mode": "sync"}}
"""Where every key can still be turned."""

ALL = {
    "input-bound": {"data.threads", "data.prefetch", "data.root", "data.augmentation"},
    "launch-bound": {"speed.cuda_graph", "speed.compile"},
    "communication-bound": {"trainer.accumulate", "bn.mode"},
    "op-bound": {"queue.dtype", "negatives.n_hard", "loss.backend", "queue.size"},
    "memory-bound": {"trainer.precision", "speed.channels_last", "speed.compile"},
    "compute-bound": {"data.image_size", "model.arch", "trainer.device"},
}


def setting(config: dict[str, Any], speed: dict[str, bool], **others: Any) -> Setting:
    first = Setting(parse(SLOW | config, "test"), Speed(**NOTHING | speed), "cuda", 1, "plain", False, "eager", "cuda")
    return first._replace(**others)


@pytest.mark.parametrize("limit", ALL)
def test_every_key_where_nothing_is_set(limit: str) -> None:
    assert set(advice(limit, setting({}, {}))) == ALL[limit] <= set(key_paths())


@pytest.mark.parametrize(
    ("limit", "config", "speed", "others", "left_out"),
    [
        ("input-bound", {}, {}, {"augmentation": "compiled"}, {"data.augmentation"}),
        ("input-bound", {}, {}, {"shards": True}, {"data.root"}),
        ("launch-bound", {}, {"cuda_graph": True}, {}, {"speed.cuda_graph"}),
        ("launch-bound", {}, {"apex": True}, {}, {"speed.cuda_graph"}),
        ("launch-bound", {}, {}, {"processes": 2}, {"speed.cuda_graph"}),
        ("launch-bound", {}, {"compile": True}, {}, {"speed.compile"}),
        ("launch-bound", {}, {"recompute": True}, {}, {"speed.compile"}),
        ("launch-bound", {}, {"cuda_graph": True, "compile": True}, {}, {"speed.cuda_graph", "speed.compile"}),
        ("communication-bound", {"bn": {"mode": "split"}}, {}, {}, {"bn.mode"}),
        ("communication-bound", {"bn": {"mode": "plain"}}, {}, {}, {"bn.mode"}),
        ("communication-bound", {"bn": {"mode": "shuffle"}}, {}, {}, set()),
        ("op-bound", {}, {}, {"backend": "cuda"}, {"loss.backend"}),
        ("op-bound", {}, {}, {"backend": "eager", "fastest": "eager", "device": "cpu"}, {"loss.backend"}),
        ("op-bound", {"queue": {"dtype": "bf16"}}, {}, {}, {"queue.dtype"}),
        ("op-bound", {"queue": {"dtype": "fp16"}}, {}, {}, {"queue.dtype"}),
        ("op-bound", {"queue": {"dtype": "fp16"}}, {}, {"device": "cpu"}, set()),
        ("op-bound", {"method": "moco"}, {}, {}, {"negatives.n_hard"}),
        ("memory-bound", {"trainer": {"precision": "bf16"}}, {}, {}, {"trainer.precision"}),
        ("memory-bound", {}, {"channels_last": True}, {}, {"speed.channels_last"}),
        ("memory-bound", {}, {"compile": True}, {}, {"speed.compile"}),
        ("memory-bound", {}, {}, {"device": "cpu"}, {"speed.compile"}),
        ("compute-bound", {"model": {"arch": "resnet10_narrow"}}, {}, {}, {"model.arch"}),
        ("compute-bound", {}, {"cuda_graph": True}, {}, {"trainer.device"}),
    ],
)
def test_what_is_left_out(
    limit: str, config: dict[str, Any], speed: dict[str, bool], others: dict[str, Any], left_out: set[str]
) -> None:
    assert set(advice(limit, setting(config, speed, **others))) == ALL[limit] - left_out


def test_the_page_says_when_no_key_is_left() -> None:
    verdict = {"limit": "launch-bound", "evidence": "", "advice": [], "numbers": {}}
    assert "No key is left" in page._verdict(verdict) and "Keys to turn" not in page._verdict(verdict)
