"""Training with MoCHi's class oracle: negatives of the query's own class leave the hard set and the loss."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from synco_fast.methods import MomentumContrast
from synco_fast.models.queue import KeyQueue
from synco_fast.ops import HardNegatives
from tests.command import call, check_error, check_refused, one_step
from tests.conftest import write_images
from tests.engine.runs import differences, final_state, rows
from tests.engine.steps import build, small_config, views
from tests.engine.test_distributed import launch
from tests.ops import oracle

HARD = HardNegatives(8, 3, 3, 3, 2, 2, 2)


def labelled_queue(rows: int, dim: int, labels: list[int], dtype: torch.dtype = torch.float64) -> KeyQueue:
    queue = KeyQueue(rows, dim, dtype, torch.Generator().manual_seed(0), labelled=True)
    assert queue.labels is not None and queue.labels.tolist() == [-1] * rows
    queue.labels.copy_(torch.tensor(labels))
    return queue


@pytest.mark.parametrize("backend", ["auto", "eager", "reference"])
@pytest.mark.parametrize("hard", [HARD, HardNegatives.none()], ids=["synthetic", "none"])
def test_the_loss_is_that_of_a_queue_without_rows_of_the_class(backend: str, hard: HardNegatives) -> None:
    """Each query alone, with a queue from which those rows are gone; class 2 leaves fewer rows than the hard set has.

    In float64 throughout; rank and rank_all are exact, sums differ by their order alone, some 1e3 roundings of 1e-16.
    """
    labels = [2] * 13 + [-1, 0, 1, 0, 1, -1, 0]
    queue = labelled_queue(20, 6, labels)
    contrast = MomentumContrast(
        nn.Flatten(), nn.Flatten(), queue, temperature=0.2, seed=5, batch_norm="plain", backend=backend
    )
    query_view, key_view = torch.randn(2, 4, 6, 1, 1, generator=torch.Generator().manual_seed(1))
    own = torch.tensor([0, 1, 2, 3])
    found = contrast(query_view, key_view, hard, torch.tensor(7), 10, labels=own).result

    q, k = (F.normalize(view.flatten(1), dim=1).double().tolist() for view in (query_view, key_view))
    expected = []
    for i, label in enumerate(own.tolist()):
        left = [row for row, of_row in zip(queue.rows.tolist(), labels, strict=True) if of_row != label]
        expected.append(oracle.infonce([q[i]], [k[i]], left, hard, 0.2, seed=5, step=7, row_offset=10 + i))
    assert float(found.loss) == pytest.approx(sum(one.loss for one in expected) / 4, rel=1e-12)
    assert found.rank.tolist() == [one.rank[0] for one in expected]
    assert found.rank_all.tolist() == [one.rank_all[0] for one in expected]
    for name, value in found.stats.items():  # float32; the hard set's mean similarity among them
        assert float(value) == pytest.approx(sum(one.stats[name] for one in expected) / 4, abs=1e-6), name
    without = contrast(query_view, key_view, hard, torch.tensor(7), 10).result
    assert abs(float(without.loss - found.loss)) > 0.1


def test_labels_are_enqueued_beside_their_rows() -> None:
    """Two full batches and one that wraps; then one that is masked."""
    queue = labelled_queue(5, 3, [-1] * 5, torch.float32)
    for step in range(3):
        keys = torch.full((2, 3), float(step)) + torch.tensor([[0.0], [0.5]])
        queue.enqueue(keys, torch.zeros(()), torch.tensor([2 * step, 2 * step + 1]))
    assert queue.labels is not None
    assert queue.labels.tolist() == [5, 1, 2, 3, 4] and queue.rows[:, 0].tolist() == [2.5, 0.5, 1.0, 1.5, 2.0]
    before = queue.rows.clone()
    queue.enqueue(torch.full((2, 3), torch.nan), torch.ones(()), torch.tensor([8, 9]))
    assert queue.labels.tolist() == [5, 1, 2, 3, 4] and torch.equal(queue.rows, before)


def test_micro_batches_take_their_own_labels() -> None:
    """A step in 4 parts leaves the labels in order, and with batch norm frozen has the loss and rows of a whole one."""
    labels = torch.arange(32) % 5
    states: list[dict[str, Any]] = []
    for accumulate in (1, 4):
        config = small_config(
            loss={"class_oracle": True}, trainer={"accumulate": accumulate}, bn={"group_size": 4}, queue={"size": 64}
        )
        step = build(config)
        for module in step.contrast.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        queue = step.contrast.queue
        assert queue.labels is not None
        queue.labels[32:] = torch.arange(32) % 5
        step(views(0), config.negatives.hard(), 0, 0.1, labels)
        assert queue.labels.tolist() == [*labels.tolist(), *(torch.arange(32) % 5).tolist()]
        states.append({"loss": step.meter.read()["loss"], "rows": queue.rows.float()})
    whole, parts = states
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    assert torch.allclose(parts["rows"], whole["rows"], atol=2**-10)


def test_without_the_oracle_a_checkpoint_has_no_labels() -> None:
    plain, with_oracle = (
        build(small_config(loss={"class_oracle": on})).contrast.state_dict().keys() for on in (False, True)
    )
    assert with_oracle - plain == {"queue.labels"} and plain - with_oracle == set()


def test_a_resumed_run_ends_with_the_same_bits(images: Path, tiny: Path, tmp_path: Path) -> None:
    """Stopped after 3 steps of 10, when the queue still has rows of the start, and in the second epoch, after 8."""

    def train(name: str, *steps: int) -> Path:
        for number in steps:
            settings = [f"output={tmp_path / name}", f"trainer.max_steps={number}", "loss.class_oracle=true"]
            options = [part for setting in settings for part in ("--set", setting)]
            done = call("pretrain", tiny, "--data", images, *options, "--resume", "auto")
            assert done.code == 0, done.err
        return tmp_path / name

    whole, resumed = train("whole", 10), train("resumed", 3, 8, 10)
    state = final_state(resumed)
    assert differences(state, final_state(whole)) == []
    assert rows(resumed) == rows(whole)
    assert set(state["model"]["queue.labels"].tolist()) == {0, 1}


def write_dark_and_bright(root: Path) -> None:
    """Two classes that any encoder tells apart in the images of a batch: 64 dark images and 64 bright ones."""
    random = np.random.default_rng(0)
    for label, level in enumerate((30, 220)):
        folder = root / "train" / f"class{label}"
        folder.mkdir(parents=True)
        for i in range(64):
            pixels = (level + random.normal(0, 10, size=(40, 40, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i:03d}.jpg")


def test_two_processes_keep_labels_beside_their_rows(tiny: Path, tmp_path: Path) -> None:
    """Each row of the queue is nearer to the mean row of its own label than to the other's.

    After one step in two micro-batches, with keys shuffled over the processes. Batch norm is frozen, so that the
    encoder at its random start sees how bright an image is and not how much brighter than its batch.
    """
    write_dark_and_bright(tmp_path / "data")
    settings = ["loss.class_oracle=true", f"data.root={tmp_path / 'data'}", "data.batch_size=64"]
    settings += ["bn.mode=shuffle", "trainer.accumulate=2"]
    first, second = (rank["model"] for rank in launch(2, tiny, tmp_path / "two", "gradient", *settings))
    rows, labels = first["queue.rows"].float(), first["queue.labels"]
    assert torch.equal(labels, second["queue.labels"]) and torch.equal(rows, second["queue.rows"].float())
    assert set(labels.tolist()) == {0, 1}
    means = F.normalize(torch.stack([rows[labels == label].mean(dim=0) for label in (0, 1)]), dim=1)
    assert torch.equal((rows @ means.T).argmax(dim=1), labels)


def test_unlabelled_data_is_refused(tiny: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    write_images(flat, 16, seed=0)
    command = one_step(tiny, flat, tmp_path / "run", "loss.class_oracle=true")
    check_refused(tmp_path / "run", *command, names=("loss.class_oracle = true", str(flat), "class folders"))


def test_profile_refuses_the_oracle(tiny: Path, tmp_path: Path) -> None:
    command = ["profile", tiny, "--synthetic", "--set", "loss.class_oracle=true", "--output", tmp_path / "profile"]
    done = call(*command)
    check_error(done.code, done.err, ("loss.class_oracle = true", "profile"))
    assert not (tmp_path / "profile").exists()
