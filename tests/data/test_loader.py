"""Loaders: places, shards, ownership of memory, errors that name the file."""

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as F

from synco_fast.data.index import Index, scan
from synco_fast.data.loader import Batch, EvalLoader, TrainLoader
from synco_fast.data.order import batch_samples
from synco_fast.data.recipes import IMAGENET_MEAN, IMAGENET_STD, RECIPES, Recipe
from synco_fast.errors import UserError
from tests.formats import FORMATS

CPU = torch.device("cpu")


def train_loader(index: Index, **changes: Any) -> TrainLoader:
    settings: dict[str, Any] = {
        "batch_size": 8,
        "image_size": 32,
        "recipe": RECIPES["moco_v2"],
        "seed": 7,
        "device": CPU,
        "threads": 2,
        "prefetch": 2,
    }
    return TrainLoader(index, **(settings | changes))


def batches(index: Index, count: int, **changes: Any) -> list[Batch]:
    loader = train_loader(index, **changes)
    result = [next(loader) for _ in range(count)]
    loader.close()
    return result


def eval_loader(index: Index, **changes: Any) -> EvalLoader:
    settings: dict[str, Any] = {
        "batch_size": 8,
        "image_size": 48,
        "resize": 56,
        "dtype": torch.float32,
        "device": CPU,
        "threads": 2,
        "prefetch": 2,
    }
    return EvalLoader(index, **(settings | changes))


def same(a: Batch, b: Batch) -> bool:
    return (a.epoch, a.step) == (b.epoch, b.step) and all(map(torch.equal, a.views, b.views))


@pytest.fixture(scope="module")
def index(jpeg_root: Path) -> Index:
    return scan(jpeg_root)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_batches_are_channels_last_views_of_dalis_memory(index: Index, dtype: torch.dtype) -> None:
    [batch] = batches(index, 1, dtype=dtype)
    assert len(batch.views) == 2
    for view in batch.views:
        assert view.shape == (8, 3, 32, 32) and view.dtype == dtype
        assert view.is_contiguous(memory_format=torch.channels_last)
        assert 0.2 < view.float().std() < 3
    assert not torch.equal(*batch.views)


def test_epochs_follow_each_other(index: Index) -> None:
    loader = train_loader(index)
    assert loader.steps_per_epoch == 7
    places = [(batch.epoch, batch.step) for batch, _ in zip(loader, range(16), strict=False)]
    loader.close()
    assert places == [(i // 7, i % 7) for i in range(16)]


def test_a_seek_gives_the_same_bits_as_iterating(index: Index) -> None:
    whole = batches(index, 12)
    for epoch, step in ((0, 3), (1, 0), (1, 4), (0, 7)):
        [batch] = batches(index, 1, epoch=epoch, step=step)
        assert same(batch, whole[epoch * 7 + step])


def test_threads_and_prefetch_do_not_change_the_bits(index: Index) -> None:
    for a, b in zip(batches(index, 4), batches(index, 4, threads=1, prefetch=1), strict=True):
        assert same(a, b)


def test_seeds_differ(index: Index) -> None:
    assert not same(*batches(index, 1), *batches(index, 1, seed=8))


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_are_the_single_process(index: Index, world_size: int) -> None:
    whole = batches(index, 3, epoch=1, step=5)
    ranks = [batches(index, 3, epoch=1, step=5, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step, batch in enumerate(whole):
        for view in range(2):
            assert torch.equal(batch.views[view], torch.cat([rank[step].views[view] for rank in ranks]))


@pytest.mark.parametrize("make", [FORMATS["tar_with_numbers"], FORMATS["imagenet"]], ids=["WebDataset", "TFRecord"])
def test_the_world_changes_size_between_epochs(
    make: Callable[[Index, Path], Path], index: Index, tmp_path: Path
) -> None:
    """Epochs of 4 steps of 12 rows out of 55 samples, each epoch on another number of processes: as on one."""
    folder, shards = index.take(range(55)), scan(make(index, tmp_path / "shards")).take(range(55))
    alone = batches(folder, 24, batch_size=12, image_size=16)
    for epoch, world_size in enumerate((1, 2, 3, 4, 2, 1)):
        ranks = [
            batches(shards, 4, batch_size=12, image_size=16, epoch=epoch, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        samples = torch.stack([torch.cat([batch.samples for batch in step]) for step in zip(*ranks, strict=True)])
        assert samples.shape == (4, 12) and len(set(samples.flatten().tolist())) == 48
        for step, expected in enumerate(alone[4 * epoch : 4 * epoch + 4]):
            assert (expected.epoch, expected.step) == (epoch, step)
            views = [torch.cat([rank[step].views[view] for rank in ranks]) for view in (0, 1)]
            assert torch.equal(samples[step], expected.samples)
            assert all(map(torch.equal, views, expected.views))


def test_seed_epoch_and_rank_all_change_order_and_crops(index: Index) -> None:
    """Any two batches of different places or seeds: other samples; and of the same sample, other views."""
    one = index.take([5] * 64)
    places = [(seed, epoch, rank) for seed in (7, 8) for epoch in (0, 1) for rank in (0, 1)]
    orders, views = set(), []
    for seed, epoch, rank in places:
        where = {"seed": seed, "epoch": epoch, "rank": rank, "world_size": 2, "batch_size": 32, "image_size": 16}
        [batch] = batches(index, 1, **where)
        orders.add(tuple(batch.samples.tolist()))
        [again] = batches(index, 1, **where)
        assert same(batch, again)
        [batch] = batches(one, 1, **where)
        views += [view for both in batch.views for view in both]
    assert len(orders) == len(places)
    assert len({view.numpy().tobytes() for view in views}) == len(views) == 8 * 2 * 16


def test_samples_and_files_name_the_rows(index: Index) -> None:
    """With the whole image as crop and nothing else drawn, every row can be recognised."""
    recipe = Recipe(
        crop_scale=(1, 1),
        crop_ratio=(1, 1),
        jitter_probability=0,
        grey_probability=0,
        blur_probability=0,
        flip_probability=0,
    )
    loader = train_loader(index, recipe=recipe, rank=1, world_size=2)
    batch = next(loader)
    first, second = batch.views
    names = loader.files(batch.samples)
    loader.close()
    assert batch.samples.tolist() == batch_samples(60, 8, 7, 0, 0)[4:].tolist() and torch.equal(first, second)
    for row, name in zip(first, names, strict=True):
        image = Image.open(index.root / name).convert("RGB")
        side = min(image.size)
        expected = torch.from_numpy(np.array(F.resize(F.center_crop(image, [side, side]), [32, 32])))
        assert (255 * denormalise(row) - expected).abs().mean() < 1


def denormalise(image: torch.Tensor) -> torch.Tensor:
    return image.permute(1, 2, 0) * torch.tensor(IMAGENET_STD) + torch.tensor(IMAGENET_MEAN)


def test_batches_alive_are_never_overwritten(index: Index) -> None:
    loader = train_loader(index)
    held = [next(loader) for _ in range(3)]
    copies = [[view.clone() for view in batch.views] for batch in held]
    for _ in range(12):
        next(loader)
    loader.close()
    del loader
    gc.collect()
    others = batches(index, 5, seed=1)  # another pipeline that allocates the same sizes
    assert len(others) == 5
    for batch, copy in zip(held, copies, strict=True):
        assert all(map(torch.equal, batch.views, copy))
    addresses = {view.data_ptr() for batch in held for view in batch.views}
    assert len(addresses) == 6


def test_the_next_batch_is_made_while_the_consumer_works(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (1200, 1600, 3), dtype=np.uint8)).save(tmp_path / f"{i}.jpg")
    loader = train_loader(scan(tmp_path), batch_size=12, threads=1, prefetch=1)
    begin = time.perf_counter()
    next(loader)
    cold = time.perf_counter() - begin
    time.sleep(3 * cold)
    begin = time.perf_counter()
    next(loader)
    warm = time.perf_counter() - begin
    loader.close()
    assert warm < 0.25 * cold


def copy_of(jpeg_root: Path, folder: Path) -> Index:
    for path in sorted((jpeg_root / "train").glob("*/*.jpg")):
        (folder / f"{path.parent.name}{path.name}").write_bytes(path.read_bytes())
    return scan(folder)


def test_bad_files_are_named_at_their_own_batch(jpeg_root: Path, tmp_path: Path) -> None:
    index = copy_of(jpeg_root, tmp_path)
    victim = index.path(int(batch_samples(60, 8, 7, epoch=0, step=3)[5]))
    good = victim.read_bytes()
    for content, message in (
        (b"", "is empty"),
        (b"this is text", "is not a readable image"),
        (good[: len(good) // 2], "is truncated"),
        (None, "cannot be read: No such file"),
    ):
        if content is None:
            victim.unlink()
        else:
            victim.write_bytes(content)
        loader = train_loader(index)
        for step in range(3):
            assert next(loader).step == step
        for _ in range(2):  # and it stays that way
            with pytest.raises(UserError, match=message) as caught:
                next(loader)
            assert victim.name in str(caught.value)
        loader.close()


def test_refusals(index: Index) -> None:
    with pytest.raises(UserError, match="60 images, fewer than one batch of 64"):
        train_loader(index, batch_size=64)
    with pytest.raises(UserError, match="multiple of 3"):
        train_loader(index, world_size=3)
    with pytest.raises(UserError, match="too small for crops"):
        eval_loader(index, image_size=64)


@pytest.mark.parametrize("world_size", [1, 2, 7])
def test_evaluation_gives_every_sample_once_in_order(index: Index, world_size: int) -> None:
    names, labels, counts = [], [], []
    whole = torch.cat([images for images, _ in eval_loader(index)])
    for rank in range(world_size):
        loader = eval_loader(index, rank=rank, world_size=world_size)
        parts = list(loader)
        assert len(parts) == len(loader)
        assert all(len(images) == 8 for images, _ in parts[:-1])
        names += [images for images, _ in parts]
        labels += [part for _, part in parts]
        counts.append(sum(len(images) for images, _ in parts))
    assert max(counts) - min(counts) <= 1 and sum(counts) == 60
    assert torch.equal(torch.cat(names), whole)
    assert index.labels is not None and torch.equal(torch.cat(labels), index.labels)


def test_evaluation_matches_pil(index: Index) -> None:
    images = torch.cat([images for images, _ in eval_loader(index)])
    assert images.is_contiguous(memory_format=torch.channels_last)
    for i, row in enumerate(images):
        image = F.resize(Image.open(index.path(i)).convert("RGB"), 56)
        expected = torch.from_numpy(np.array(F.center_crop(image, [48, 48])))
        assert (255 * denormalise(row) - expected).abs().mean() < 1, index.files[i]


def test_evaluation_can_be_repeated_abandoned_and_unlabelled(index: Index) -> None:
    loader = eval_loader(index, dtype=torch.float16)
    first, _ = next(iter(loader))
    again, _ = next(iter(loader))
    assert first.dtype == torch.float16 and torch.equal(first, again)
    unlabelled = Index(index.root, index.files, None, ())
    assert all(labels is None for _, labels in eval_loader(unlabelled))


def test_evaluation_names_bad_files(jpeg_root: Path, tmp_path: Path) -> None:
    index = copy_of(jpeg_root, tmp_path)
    index.path(41).write_bytes(index.path(41).read_bytes()[:300])
    with pytest.raises(UserError, match=index.files[41]):
        list(eval_loader(index))
