"""The demo's images: reproducible, balanced, varied, written whole or not at all."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from synco_fast.data.procedural import CLASSES, draw, write_demo_set
from synco_fast.errors import UserError


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def jpegs(root: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(root).items() if name.endswith(".jpg")}


@pytest.fixture(scope="module")
def demo_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("procedural") / "set"
    write_demo_set(root, train=40, val=20, seed=3)
    return root


@pytest.fixture
def own_copy(demo_set: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_set, tmp_path / "set"))


def test_layout_is_balanced_and_named_by_class(demo_set: Path) -> None:
    expected = {
        f"{split}/{name}/{number:04d}.jpg"
        for split, count in (("train", 4), ("val", 2))
        for name in CLASSES
        for number in range(count)
    }
    assert len(CLASSES) == 10
    assert set(contents(demo_set)) == expected | {"demo.json"}
    assert [path.name for path in demo_set.parent.iterdir()] == [demo_set.name]


def test_images_are_colour_jpegs_of_varied_size_and_quality(demo_set: Path) -> None:
    sizes, tables = set(), set()
    for data in jpegs(demo_set).values():
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            assert (image.format, image.mode) == ("JPEG", "RGB")
            assert all(72 <= side <= 128 for side in image.size)
            sizes.add(image.size)
            tables.add(tuple(image.quantization[0]))
    assert len(sizes) > 30
    assert len({width > height for width, height in sizes}) == 2
    assert len(tables) > 10


def test_no_two_images_are_equal(demo_set: Path) -> None:
    images = jpegs(demo_set).values()
    assert len(set(images)) == len(images)


def test_an_image_depends_on_seed_split_class_and_number_only(demo_set: Path, tmp_path: Path) -> None:
    write_demo_set(tmp_path / "smaller", train=20, val=10, seed=3)
    write_demo_set(tmp_path / "other_seed", train=20, val=10, seed=4)
    full = jpegs(demo_set)
    for name, data in jpegs(tmp_path / "smaller").items():
        assert data == full[name]
    for name, data in jpegs(tmp_path / "other_seed").items():
        assert data != full[name]


def test_classes_share_their_colours() -> None:
    """The mean colour of a class is that of all, within 4 standard errors: colour tells no class."""
    means = np.array(
        [
            [np.asarray(draw(label, np.random.default_rng((label, i))), float).mean((0, 1)) for i in range(60)]
            for label in range(len(CLASSES))
        ]
    )
    errors = means.std(axis=1) / np.sqrt(means.shape[1])
    assert (np.abs(means.mean(1) - means.mean((0, 1))) < 4 * errors).all()
    assert means.std(axis=(0, 1)).min() > 10  # of 255: images do differ in colour


def test_progress_counts_every_image(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    write_demo_set(tmp_path / "set", train=10, val=10, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(done, 20) for done in range(1, 21)]


def test_a_complete_set_is_left_alone(own_copy: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in own_copy.rglob("*")}
    calls: list[int] = []
    write_demo_set(own_copy, train=40, val=20, seed=3, progress=lambda done, _: calls.append(done))
    assert {path: path.stat().st_mtime_ns for path in own_copy.rglob("*")} == before
    assert calls == []


def test_an_empty_folder_and_missing_parents_are_fine(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for root in (tmp_path / "empty", tmp_path / "new" / "set"):
        write_demo_set(root, train=10, val=10)
        assert len(jpegs(root)) == 20


@pytest.mark.parametrize("change", [{"train": 50}, {"val": 30}, {"seed": 5}])
def test_other_parameters_are_refused(own_copy: Path, change: dict[str, int]) -> None:
    before = contents(own_copy)
    with pytest.raises(UserError, match="delete the folder"):
        write_demo_set(own_copy, **({"train": 40, "val": 20, "seed": 3} | change))
    assert contents(own_copy) == before


def test_a_set_of_an_older_drawing_is_refused(own_copy: Path) -> None:
    record = own_copy / "demo.json"
    found = json.loads(record.read_text())
    record.write_text(json.dumps(found | {"drawing": found["drawing"] - 1}))
    with pytest.raises(UserError, match="delete the folder"):
        write_demo_set(own_copy, train=40, val=20, seed=3)


def test_a_set_with_missing_images_is_refused(own_copy: Path) -> None:
    (own_copy / "val" / "rings" / "0001.jpg").unlink()
    with pytest.raises(UserError, match=r"rings.*1 images, 2 were written"):
        write_demo_set(own_copy, train=40, val=20, seed=3)


def test_an_unreadable_record_is_refused(own_copy: Path) -> None:
    (own_copy / "demo.json").write_text("{")
    with pytest.raises(UserError, match="not readable as JSON"):
        write_demo_set(own_copy, train=40, val=20, seed=3)


def test_anything_else_in_the_folder_is_refused_and_kept(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    root.mkdir()
    (root / "holiday.jpg").write_bytes(b"mine")
    with pytest.raises(UserError, match="holds something else"):
        write_demo_set(root, train=10, val=10)
    assert contents(root) == {"holiday.jpg": b"mine"}


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    for root in (tmp_path / "file", tmp_path / "file" / "set"):
        (tmp_path / "file").write_text("mine")
        with pytest.raises(UserError, match="file"):
            write_demo_set(root, train=10, val=10)
        assert (tmp_path / "file").read_text() == "mine"


def test_an_interruption_leaves_nothing(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 15:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_demo_set(tmp_path / "set", train=10, val=10, progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_taken_over(tmp_path: Path) -> None:
    left = tmp_path / ".set.tmp" / "train" / "stripes"
    left.mkdir(parents=True)
    (left / "9999.jpg").write_bytes(b"half")
    write_demo_set(tmp_path / "set", train=10, val=10)
    assert len(jpegs(tmp_path / "set")) == 20
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize("change", [{"train": 0}, {"train": 15}, {"val": 0}, {"val": -10}, {"seed": -1}])
def test_impossible_numbers_are_refused(tmp_path: Path, change: dict[str, int]) -> None:
    with pytest.raises(UserError, match=next(iter(change))):
        write_demo_set(tmp_path / "set", **({"train": 10, "val": 10} | change))
    assert list(tmp_path.iterdir()) == []
