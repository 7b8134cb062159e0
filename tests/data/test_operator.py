"""The operator's two implementations against Pillow, and against each other: every colour, odd sizes, bad numbers."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nvidia.dali import fn
from nvidia.dali.pipeline import pipeline_def
from PIL import Image
from torchvision.transforms import functional as F

from synco_fast.data import operator
from synco_fast.data.numbers import NOTHING, VIEW_NUMBERS
from synco_fast.data.operator import view_operator
from synco_fast.data.plain_view import make_view
from synco_fast.errors import UserError

CPU = torch.device("cpu")
IDENTITY = torch.arange(256.0).expand(3, 256).contiguous()
BRIGHTNESS, CONTRAST, SATURATION, HUE, GREY = range(5)


def numbers(
    crop: tuple[int, int, int, int],
    resized: tuple[int, int],
    *,
    window: tuple[int, int] = (0, 0),
    flip: bool = False,
    blur: tuple[int, int, int] = (-1, 0, 0),
    steps: list[tuple[int, float]] | None = None,
) -> torch.Tensor:
    padded = [*(steps or []), *[(NOTHING, 0.0)] * 5][:5]
    return torch.tensor([*crop, *resized, *window, flip, *blur, *(x for step in padded for x in step)])


def compiled(images: list[torch.Tensor], rows: torch.Tensor, size: int) -> torch.Tensor:
    """The compiled operator on decoded images, (B, size, size, 3)."""

    @pipeline_def(batch_size=len(images), num_threads=2, device_id=None, exec_dynamic=True)
    def define():  # type: ignore[no-untyped-def]
        source = lambda: [[image.numpy() for image in images], rows.numpy()]  # noqa: E731
        inputs = fn.external_source(source=source, num_outputs=2)
        return view_operator("compiled", CPU, size=size, values=IDENTITY, dtype=torch.float32)(*inputs)

    pipeline = define()
    pipeline.build()
    return torch.from_numpy(np.array(pipeline.run()[0].as_tensor()))


def both(image: torch.Tensor, row: torch.Tensor, size: int) -> torch.Tensor:
    """One view from both implementations, which agree."""
    ours = compiled([image], row[None], size)[0]
    assert torch.equal(ours, make_view(image, row, size, IDENTITY))
    return ours.byte()


@pytest.fixture(scope="module")
def every_colour() -> torch.Tensor:
    """(4096, 4096, 3)."""
    values = torch.arange(2**24).view(4096, 4096)
    return torch.stack([values >> 16, values >> 8 & 255, values & 255], dim=2).byte()


@pytest.mark.parametrize(
    ("kind", "factor", "adjust"),
    [
        (SATURATION, 1.375, lambda image: F.adjust_saturation(image, 1.375)),
        (HUE, 256 - 102, lambda image: F.adjust_hue(image, -0.4)),
        (GREY, 0, lambda image: F.to_grayscale(image, 3)),
    ],
)
def test_every_colour_becomes_what_pillow_makes_of_it(
    every_colour: torch.Tensor, kind: int, factor: float, adjust: Callable[[Image.Image], Image.Image]
) -> None:
    row = numbers((0, 0, 4096, 4096), (4096, 4096), steps=[(kind, factor)])
    ours = compiled([every_colour], row[None], 4096)[0].byte()
    assert torch.equal(ours, torch.from_numpy(np.array(adjust(Image.fromarray(every_colour.numpy())))))
    assert torch.equal(make_view(every_colour, row, 4096, IDENTITY).byte(), ours)


@pytest.mark.parametrize("factor", [0.0, 0.6, 0.999, 1.001, 1.4, 3.0])
@pytest.mark.parametrize(("kind", "adjust"), [(BRIGHTNESS, F.adjust_brightness), (CONTRAST, F.adjust_contrast)])
def test_every_value_becomes_what_pillow_makes_of_it(
    kind: int, adjust: Callable[[Image.Image, float], Image.Image], factor: float
) -> None:
    image = torch.arange(256).repeat(256, 3, 1).permute(0, 2, 1).byte().contiguous()
    ours = both(image, numbers((0, 0, 256, 256), (256, 256), steps=[(kind, factor)]), 256)
    factor = float(np.float32(factor))
    assert torch.equal(ours, torch.from_numpy(np.array(adjust(Image.fromarray(image.numpy()), factor))))


def resize(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Pillow, along rows first."""
    picture = Image.fromarray(image.numpy())
    for size in ((width, picture.height), (width, height)):
        picture = picture.resize(size, Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(picture))


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(1, 1, 9), (2, 3, 16), (3, 1, 5), (7, 300, 16), (300, 7, 33), (64, 64, 64), (90, 61, 31)],
)
def test_resizing_is_pillows(height: int, width: int, size: int) -> None:
    image = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(0)).byte()
    ours = both(image, numbers((0, 0, height, width), (size, size)), size)
    assert torch.equal(ours, resize(image, size, size))


def test_the_widest_blur() -> None:
    """Of the largest values, whose sums must not overflow."""
    image = torch.full((40, 50, 3), 255, dtype=torch.uint8)
    image[10:20] = 0
    weight = 2**24 // 255
    both(image, numbers((0, 0, 40, 50), (33, 33), blur=(127, weight, (2**24 - 255 * weight) // 2)), 33)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_implementations_agree_on_any_view(data: st.DataObject) -> None:
    integer = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    image_height, image_width, size = integer(1, 120), integer(1, 120), integer(1, 70)
    height, width = integer(1, image_height), integer(1, image_width)
    resized = integer(size, 90), integer(size, 90)
    window = tuple(integer(0, side - size) for side in resized)
    radius = integer(-1, 4)
    weight = integer(0, 2**24 // (2 * radius + 1)) if radius >= 0 else 0
    kinds = data.draw(st.lists(st.integers(-1, 4), max_size=5))
    row = numbers(
        (integer(0, image_height - height), integer(0, image_width - width), height, width),
        resized,
        window=window,  # type: ignore[arg-type]
        flip=data.draw(st.booleans()),
        blur=(radius, weight, (2**24 - (2 * radius + 1) * weight) // 2),
        steps=[(k, float(integer(0, 255)) if k == HUE else data.draw(st.floats(0, 3, width=32))) for k in kinds],
    )
    generator = torch.Generator().manual_seed(integer(0, 99))
    both(torch.randint(0, 256, (image_height, image_width, 3), generator=generator).byte(), row, size)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop": (5, 0, 8, 8)}, "the crop is not inside its image"),
        ({"crop": (0, -1, 8, 8)}, "the crop is not inside its image"),
        ({"crop": (0, 0, 0, 8)}, "the crop is not inside its image"),
        ({"window": (1, 0)}, "the window is not inside the resized crop"),
        ({"steps": [(7, 1.0)]}, "no such colour operation"),
        ({"blur": (128, 1, 1)}, "the blur is too wide"),
    ],
)
def test_bad_numbers_are_refused(changes: dict[str, object], message: str) -> None:
    row = numbers(**({"crop": (0, 0, 8, 8), "resized": (4, 4)} | changes))  # type: ignore[arg-type]
    image = torch.zeros(10, 9, 3, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=f"numbers of sample 1: {message}"):
        compiled([image, image], torch.stack([numbers((0, 0, 8, 8), (4, 4)), row]), 4)
    assert row.shape == (VIEW_NUMBERS,)


def test_a_library_for_another_dali_is_not_loaded(tmp_path, monkeypatch, caplog) -> None:  # type: ignore[no-untyped-def]
    other = tmp_path / operator.LIBRARY.name
    other.write_bytes(operator.LIBRARY.read_bytes().replace(b"built for DALI ", b"built for DALI 0"))
    monkeypatch.setattr(operator, "LIBRARY", other)
    for cached in (operator._load, operator._warn_once):
        cached.cache_clear()
    try:
        assert "was not built for this DALI" in operator.status(CPU)
        assert operator.resolve("auto", CPU) == operator.resolve("auto", CPU) == "plain"
        assert caplog.text.count("plain torch makes the views, slowly") == 1
        with pytest.raises(UserError, match=r"data\.augmentation = compiled: cannot be used here: .* builds it anew"):
            operator.resolve("compiled", CPU)
        monkeypatch.setattr(operator, "LIBRARY", tmp_path / "absent.so")
        operator._load.cache_clear()
        assert "the augmentation is not compiled" in operator.status(CPU)
    finally:
        for cached in (operator._load, operator._warn_once):
            cached.cache_clear()
