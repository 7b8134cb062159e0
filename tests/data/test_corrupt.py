"""Hostile files among good ones: which are bad, what `fail` says, and what `skip` does instead."""

import gc
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from synco_fast.data.corrupt import blames_file
from synco_fast.data.index import Index, scan
from synco_fast.data.loader import Batch, EvalLoader, TrainLoader
from synco_fast.data.numbers import evaluation_numbers
from synco_fast.data.order import batch_samples, epoch_order
from synco_fast.data.pipeline import evaluation_pipeline
from synco_fast.data.reader import read_image
from synco_fast.data.recipes import RECIPES
from synco_fast.data.verify import verify
from synco_fast.errors import UserError
from tests.hostile import hostile_kinds, write_hostile

CPU = torch.device("cpu")
GOOD, HOSTILE, BATCH = 300, 30, 16
N = GOOD + HOSTILE


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> tuple[Index, set[int]]:
    """330 files, and the numbers of the 23 bad ones."""
    root = tmp_path_factory.mktemp("hostile")
    names = write_hostile(root, GOOD, HOSTILE)
    index = scan(root)
    bad = {i for i, file in enumerate(index.files) if file in names}
    assert len(bad) == len(names) == 23
    return index, bad


def loader(index: Index, said: list[str] | None = None, **changes: Any) -> TrainLoader:
    settings: dict[str, Any] = {
        "batch_size": BATCH,
        "image_size": 16,
        "recipe": RECIPES["moco_v2"],
        "seed": 5,
        "device": CPU,
        "threads": 2,
        "prefetch": 2,
        "on_corrupt": "skip",
    }
    made = TrainLoader(index, **(settings | changes))
    made.bad.on_skip = (said if said is not None else []).append
    return made


def epochs_of(made: TrainLoader, end: int) -> list[list[Batch]]:
    """What is left of the epochs before `end`, each; then the loader is closed."""
    first = made.epoch
    epochs: list[list[Batch]] = [[] for _ in range(first, end)]
    while (batch := next(made)).epoch < end:
        epochs[batch.epoch - first].append(batch)
    made.close()
    return epochs


def flat(batches: list[Batch]) -> list[int]:
    return [sample for batch in batches for sample in batch.samples.tolist()]


def same(a: Batch, b: Batch) -> bool:
    place = (a.epoch, a.step) == (b.epoch, b.step)
    return place and torch.equal(a.samples, b.samples) and all(map(torch.equal, a.views, b.views))


def test_verify_finds_exactly_the_bad_ones(hostile: tuple[Index, set[int]]) -> None:
    index, bad = hostile
    assert set(verify(index, workers=2).faults) == bad


def test_fail_names_the_first_in_the_order_of_the_batch(hostile: tuple[Index, set[int]]) -> None:
    index, bad = hostile
    order = epoch_order(N, 5, 0).tolist()
    first = next(sample for sample in order if sample in bad)
    step = order.index(first) // BATCH
    made = loader(index, on_corrupt="fail")
    assert all(next(made).step == i for i in range(step))
    for _ in range(2):  # and it stays that way
        with pytest.raises(UserError) as caught:
            next(made)
        assert str(caught.value).startswith(f"image file {index.path(first)} ")
        assert "data.on_corrupt=skip" in str(caught.value) and "data verify" in str(caught.value)
    made.close()


def test_skip_goes_through_every_good_file_once(hostile: tuple[Index, set[int]]) -> None:
    """In each of three epochs, but for less than a batch; and every bad file is told of once."""
    index, bad = hostile
    said: list[str] = []
    made = loader(index, said)
    for batches in epochs_of(made, 3):
        assert [batch.step for batch in batches] == list(range((N - len(bad)) // BATCH))
        samples = flat(batches)
        assert not bad & set(samples)
        assert len(samples) == len(set(samples)) > N - len(bad) - BATCH
    found = made.bad.found
    assert set(found) <= bad and len(found) == len(set(found)) == len(said) > len(bad) - BATCH
    for sample, line in zip(found, said, strict=True):
        assert line.startswith(f"skipping image file {index.path(sample)}: it ")


def test_slots_keep_their_views(hostile: tuple[Index, set[int]]) -> None:
    """All rows of a batch but the replaced ones are those of a data set without bad files."""
    index, bad = hostile
    step = next(step for step in range(N // BATCH) if bad & set(batch_samples(N, BATCH, 5, 0, step).tolist()))
    batch = next(loader(index, step=step))
    asked = batch_samples(N, BATCH, 5, 0, step).tolist()
    kept = [row for row, sample in enumerate(asked) if sample not in bad]
    assert [int(batch.samples[row]) for row in kept] == [asked[row] for row in kept]
    spare = epoch_order(N, 5, 0).tolist()[::-1]
    assert [int(batch.samples[row]) for row in range(BATCH) if row not in kept] == spare[: BATCH - len(kept)]
    good = asked[kept[0]]
    clean = index.take([i if i not in bad else good for i in range(N)])
    for view, other in zip(batch.views, next(loader(clean, step=step)).views, strict=True):
        assert torch.equal(view[kept], other[kept])


def test_the_state_brings_back_the_remaining_batches(hostile: tuple[Index, set[int]]) -> None:
    """Stopped after every fifth batch; bit for bit, with the same files found in the same order."""
    index, _ = hostile
    whole = loader(index)
    batches, states = [], []
    for _ in range(30):
        states.append((whole.epoch, whole.step, list(whole.bad.found)))
        batches.append(next(whole))
    whole.close()
    assert states[0][2] == [] and states[5][2] and states[5][2] != states[10][2]
    for start in range(0, 30, 5):
        epoch, step, found = states[start]
        again = loader(index, epoch=epoch, step=step, skipped=found)
        assert all(same(next(again), batch) for batch in batches[start:])
        again.close()
        assert again.bad.found == whole.bad.found


def test_what_is_known_to_be_bad_is_never_opened(hostile: tuple[Index, set[int]]) -> None:
    """With all of them known there is nothing to fail on, and the first epoch's batches are those of finding them."""
    index, _ = hostile
    finding = loader(index)
    [batches] = epochs_of(finding, 1)
    known = loader(index, skipped=finding.bad.found, on_corrupt="fail")
    assert all(same(next(known), batch) for batch in batches)
    known.close()


def test_a_state_at_the_end_of_an_epoch_that_got_shorter(hostile: tuple[Index, set[int]]) -> None:
    """19 steps hold what another number of processes went through in 20: step 19 is the next epoch's first."""
    index, bad = hostile
    made = loader(index, step=19, skipped=sorted(bad))
    batch = next(made)
    made.close()
    assert (batch.epoch, batch.step) == (1, 0)


def test_a_state_beyond_the_end_of_an_epoch_that_got_shorter(hostile: tuple[Index, set[int]]) -> None:
    """Of the next epoch, nothing is left out."""
    index, bad = hostile
    made = loader(index, step=N // BATCH, skipped=sorted(bad))
    batch = next(made)
    made.close()
    assert (batch.epoch, batch.step) == (1, 0)


def test_ranks_replace_from_their_own_share(hostile: tuple[Index, set[int]]) -> None:
    """312 files, 5 of them bad: batches of 64 leave 56 spare ones, 28 for each of two ranks."""
    index, bad = hostile
    some = [i for i in range(N) if i not in bad] + sorted(bad)[:5]
    part, worse = index.take(some), set(range(len(some) - 5, len(some)))
    order = epoch_order(len(some), 5, 0).tolist()
    steps = len(some) // 64
    spare = order[steps * 64 :][::-1]
    seen: list[int] = []
    for rank in range(2):
        made = loader(part, batch_size=64, rank=rank, world_size=2)
        [batches] = epochs_of(made, 1)
        assert len(batches) == steps
        rows = torch.tensor(order[: steps * 64]).view(steps, 2, 32)[:, rank].flatten().tolist()
        samples = flat(batches)
        good = [sample for sample in spare[rank::2] if sample not in worse]
        new = [b for a, b in zip(rows, samples, strict=True) if a in worse]
        assert [b for a, b in zip(rows, samples, strict=True) if a not in worse] == [a for a in rows if a not in worse]
        assert sorted(new) == sorted(good[: len(new)])
        seen += samples
    assert len(seen) == len(set(seen)) == steps * 64 and not worse & set(seen)


def test_used_up(hostile: tuple[Index, set[int]]) -> None:
    index, bad = hostile
    few = index.take([*sorted(bad)[:6], *[i for i in range(N) if i not in bad][:26]])
    made = loader(few, rank=1, world_size=2)
    with pytest.raises(UserError, match=r"\d bad files were skipped, and process 1 has no sample left .* 0 spare ones"):
        epochs_of(made, 2)
    made.close()
    made = loader(few, batch_size=30)
    with pytest.raises(UserError, match=r"6 bad files were skipped, and 26 of 32 images are left, .* one batch of 30"):
        next(made)
    made.close()


def test_rebuilt_pipelines_leave_no_threads(hostile: tuple[Index, set[int]]) -> None:
    """Not even until the garbage collector comes by."""
    index, _ = hostile

    def running() -> int:
        return len(os.listdir("/proc/self/task"))

    gc.collect()
    before = running()
    gc.disable()
    try:
        made = loader(index)
        epochs_of(made, 1)
    finally:
        gc.enable()
    assert len(made.bad.found) > 5
    deadline = time.monotonic() + 10
    while running() > before and time.monotonic() < deadline:  # an order may still be being cached
        time.sleep(0.1)
    assert running() <= before


def evaluation(index: Index, **changes: Any) -> EvalLoader:
    settings: dict[str, Any] = {"batch_size": 16, "image_size": 16, "resize": 16, "dtype": torch.float32}
    return EvalLoader(index, **settings, device=CPU, threads=2, prefetch=2, **changes)


@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_leaves_bad_files_out(hostile: tuple[Index, set[int]], world_size: int) -> None:
    """Under `skip`: images and labels of the good ones, in order; the second pass meets no bad file any more."""
    index, bad = hostile
    good = index.take([i for i in range(N) if i not in bad])
    expected = torch.cat([images for images, _ in evaluation(good)])
    assert good.labels is not None
    found: list[int] = []
    parts: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    for rank in range(world_size):
        made = evaluation(index, rank=rank, world_size=world_size, on_corrupt="skip")
        said: list[str] = []
        made.bad.on_skip = said.append
        parts += list(made)
        found += made.bad.found
        known = len(said)
        assert len(list(made)) > 0 and len(said) == known
    assert found == sorted(bad)
    assert torch.equal(torch.cat([images for images, _ in parts]), expected)
    assert torch.equal(torch.cat([labels for _, labels in parts if labels is not None]), good.labels)


def test_evaluation_of_nothing_but_bad_files(hostile: tuple[Index, set[int]]) -> None:
    index, bad = hostile
    made = evaluation(index.take(sorted(bad)), on_corrupt="skip")
    made.bad.on_skip = lambda text: None
    assert list(made) == []


def test_an_error_that_is_no_files_fault_is_not_skipped(hostile: tuple[Index, set[int]]) -> None:
    """The operator refuses such views, which is no reason to leave files out."""
    made = loader(hostile[0], image_size=1_000_000)
    with pytest.raises(RuntimeError):
        next(made)
    made.close()
    assert set(made.bad.found) <= hostile[1]


def test_only_what_dali_says_counts_not_where_it_was_called(tmp_path: Path) -> None:
    """Its messages begin with paths, which may hold any word."""
    (tmp_path / "a.png").write_bytes(hostile_kinds(np.random.default_rng(0))["PNG cut"][0])
    data, _ = read_image(scan(tmp_path).sample(0))
    pipeline = evaluation_pipeline(
        lambda: [[data], evaluation_numbers(torch.tensor([[60, 80]]), 16, 16).numpy()],
        batch_size=1,
        image_size=16,
        dtype=torch.float32,
        augmentation="auto",
        device=torch.device("cpu"),
        threads=1,
        prefetch=1,
    )
    with pytest.raises(RuntimeError) as caught:
        pipeline.run()
    message = str(caught.value)
    assert "synco_fast/data/pipeline.py" in message and blames_file(message)
    assert blames_file(message.replace("synco_fast/data/", "alloc/"))
    where = message.rpartition("encountered:")[0]
    assert not blames_file(where + "encountered:\n\nstd::bad_alloc")
    assert not blames_file(message.replace("decoders.image", "synco_view").replace("synco_fast/data/", "decoders/"))
