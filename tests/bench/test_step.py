"""bench.step's contenders compute the step they are named after, and its rows are whole. No timing is asserted."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import measure, step, step_rows
from bench.rows import Row
from bench.step_contenders import (
    CHANGES,
    CONTENDERS,
    Built,
    Contender,
    FoldedBatchNorm2d,
    Loss,
    OurStep,
    PlainStep,
    ablated_keys,
    moco_loss,
    model_flops,
    published_loss,
    random_batches,
    vectorised_loss,
)
from synco_fast.config import Config, parse

CPU = torch.device("cpu")
HARD = {
    "n_hard": 16,
    **dict.fromkeys(("interpolated", "extrapolated", "mixed", "noisy", "perturbed", "adversarial"), 4),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config(method: str = "moco", bn: str = "plain", precision: str = "fp32", **speed: Any) -> Config:
    """A small one whose key encoder moves far enough in two steps to be seen."""
    return parse(
        {
            "method": method,
            "data": {"batch_size": 8, "image_size": 32, "eval_resize": 32},
            "model": {"arch": "resnet10_narrow", "dim": 16, "momentum": 0.9},
            "bn": {"mode": bn, "group_size": 4},
            "queue": {"size": 32, "dtype": "fp32"},
            "negatives": HARD if method == "synco" else {},
            "trainer": {"precision": precision, "device": "cpu"},
            "speed": speed,
        },
        "test",
    )


class Outcome:
    """What steps leave behind: losses, and weights and queue as one vector each."""

    def __init__(self, losses: list[Tensor], query: nn.Module, key: nn.Module, queue: Tensor) -> None:
        self.losses = torch.stack(losses).double()
        self.query, self.key = (
            torch.cat([parameter.detach().double().flatten() for parameter in encoder.parameters()])
            for encoder in (query, key)
        )
        self.queue = queue.double()

    def distances(self, other: "Outcome") -> dict[str, float]:
        return {name: float((value - getattr(other, name)).norm()) for name, value in vars(self).items()}


def plain(made: Config, loss: Loss, dtype: torch.dtype = torch.float32, **how: bool) -> Outcome:
    """Two steps in a dtype, from the same start."""
    taken = PlainStep(made, CPU, loss, **how)
    for encoder in (taken.query_encoder, taken.key_encoder):
        encoder.to(dtype)
    taken.queue = taken.queue.to(dtype)
    losses = []
    for number, (query, key) in enumerate(random_batches(made, CPU).contiguous[:2]):
        torch.manual_seed(number)  # of what published losses draw
        losses.append(taken((query.to(dtype), key.to(dtype))))
    return Outcome(losses, taken.query_encoder, taken.key_encoder, taken.queue)


def our(made: Config, change: Callable[[OurStep], None] | None = None) -> Outcome:
    taken = OurStep(made, CPU)
    if change is not None:
        change(taken)
    losses = [taken(views).clone() for views in random_batches(made, CPU).channels_last[:2]]
    contrast = taken.contrast
    return Outcome(losses, contrast.query_encoder, contrast.key_encoder, contrast.queue.rows)


def assert_as_near(found: Outcome, exact: Outcome, rounded: Outcome) -> None:
    """Found is as near to what float64 gives as another float32 computation is: within 4 times, as two computations
    that round in different orders (channels last, multi-tensor updates, the closed form) seldom agree to more."""
    noise, error = rounded.distances(exact), found.distances(exact)
    for name, value in error.items():
        # The loss's own float32 result is off by half an eps of it at the least.
        floor = float(exact.losses.norm()) * 2.0**-23 if name == "losses" else 0.0
        assert value <= 4 * noise[name] + floor, (name, value, noise[name])


def test_plain_moco_and_ours_take_the_same_steps() -> None:
    made = config()
    exact = plain(made, moco_loss(made), torch.float64, columns=True)
    rounded = plain(made, moco_loss(made), columns=True)
    assert_as_near(our(made), exact, rounded)
    start = OurStep(made, CPU).contrast
    moved = exact.distances(Outcome(list(exact.losses), start.query_encoder, start.key_encoder, start.queue.rows))
    noise = rounded.distances(exact)
    assert min(moved[name] / noise[name] for name in ("query", "key", "queue")) > 100, "or nothing was compared"


@pytest.mark.parametrize("what", CHANGES)
def test_what_is_replaced_computes_the_same(what: str) -> None:
    made = config()
    loss = moco_loss(made)
    assert_as_near(our(made, CHANGES[what]), plain(made, loss, torch.float64), plain(made, loss))


def test_both_published_styles_take_the_same_steps() -> None:
    made = config("synco")
    losses = published_loss(made), vectorised_loss(made)
    exact = plain(made, losses[0], torch.float64)
    first, second = (plain(made, loss) for loss in losses)
    # Draws in float64 are others, so that the two are held against each other, by what rounding makes of MoCo's steps.
    noise = plain(made, moco_loss(made)).distances(plain(made, moco_loss(made), torch.float64))
    for name, value in first.distances(second).items():
        assert value <= 4 * noise[name] + float(exact.losses.norm()) * 2.0**-23, name
    assert first.losses[1] != plain(made, moco_loss(made)).losses[1]


def test_folded_batch_norm_is_batch_norm_of_each_group() -> None:
    torch.manual_seed(0)
    folded, images = FoldedBatchNorm2d(5, 3).double(), torch.randn(12, 5, 4, 4, dtype=torch.float64)
    found = folded(images)
    kept = []
    for group in range(3):
        alone = nn.BatchNorm2d(5).double()
        # Sample i is folded into group i modulo the number of groups.
        torch.testing.assert_close(found[group::3], alone(images[group::3]))
        kept.append(alone.running_mean)
    torch.testing.assert_close(
        folded.running_mean, torch.stack([mean for mean in kept if mean is not None]).mean(dim=0)
    )


def test_keys_are_shuffled_over_folded_groups_and_put_back() -> None:
    made = config(bn="split")
    taken = PlainStep(made, CPU, moco_loss(made), folded=True)
    groups = [module.groups for module in taken.key_encoder.modules() if isinstance(module, FoldedBatchNorm2d)]
    assert groups and set(groups) == {2}
    taken.encode_keys = lambda images: images.mean(dim=(1, 2, 3))[:, None]
    images = random_batches(made, CPU).contiguous[0][1]
    assert torch.equal(taken._keys(images), images.mean(dim=(1, 2, 3))[:, None])


def test_flops_of_the_narrow_network_by_hand() -> None:
    """Multiply-adds of an image of 32 px, layer by layer: pixels x kernel x channels in x channels out."""
    made = config()
    stem = 16 * 16 * 25 * 3 * 24
    convolutions, pixels, width = 0, 16, 24
    for wider in (24, 48, 96, 192):
        pixels //= 2
        convolutions += pixels**2 * (9 * width * wider + 9 * wider * wider + width * wider)  # two, and the shortcut
        width = wider
    head = 192 * 192 + 192 * 16
    forward = stem + convolutions + head
    backward = stem + 2 * (convolutions + head)  # no gradient of the images
    products = (1 + 32) * 16  # with the key and the queue, of which only q's gradient is taken
    assert model_flops(made) == 2 * 8 * (2 * forward + backward + 2 * products)


def test_the_interval_of_known_ratios() -> None:
    # Rounds of any speed at all, with the same ratio in each: no doubt is left.
    assert measure.paired_ratio([1.0, 10.0, 7.0], [2.0, 20.0, 14.0]) == (2.0, 2.0, 2.0)
    # Order statistics: of 25 values, numbers 8 and 18 enclose the median with 95.7%, and 9 and 17 with 89.2%.
    found = measure.paired_ratio([1.0] * 25, [float(value) for value in range(1, 26)])
    assert found.median == 13 and found.low in (8, 9) and found.high in (17, 18)
    assert found == measure.paired_ratio([1.0] * 25, [float(value) for value in range(1, 26)])


def test_far_quantiles_are_drawn_from_more() -> None:
    drawn = {tail: len(measure.resampled_medians([1.0, 2.0], 0, tail)) for tail in (0.025, 0.00125, 1e-9)}
    assert drawn == {0.025: 4000, 0.00125: 40_000, 1e-9: 100_000}


def quick(tmp_path: Path, *arguments: str) -> list[Row]:
    """Rows of a quick run in this process."""
    path = tmp_path / "rows.jsonl"
    assert step.main(["--quick", "--device", "cpu", "--threads", "1", "--output", str(path), *arguments]) == 0
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_quick_run_has_a_whole_row_for_each_contender(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = quick(tmp_path, "--ablate", "--data", str(images), "--batch", "8,16")
    half = len(found) // 2
    names = [row["contender"] for row in found[:half]]
    assert names == [row["contender"] for row in found[half:]] and {row["batch"] for row in found[:half]} == {8}
    assert names[:7] == [name for name in CONTENDERS if name != "moco_compiled"] and names[-1] == "synco_from_files"
    assert {f"synco {what}" for what in CHANGES} < set(names)
    for row in found:
        assert list(row) == list(step_rows.FIELDS), row["contender"]
        assert len(row["ms_of_each_round"]) == row["n"] == 2 and min(row["ms_of_each_round"]) > 0
        # Stored to 5 digits each: a number is off by up to 5e-5 of itself, and three take part.
        assert row["images_per_second"] == pytest.approx(1e3 * row["batch"] / row["median_ms"], rel=2e-4)
        assert row["mfu"] == pytest.approx(1e3 * row["model_flops"] / row["median_ms"] / row["peak_flops"], rel=2e-4)
        assert row["hours_200_epochs"] == pytest.approx(1281167 * 200 / row["images_per_second"] / 3600, rel=2e-4)
        for base in step_rows.BASES:
            ratio = row[f"ratio_to_{base}"]
            assert ratio["median"] > 0 and ratio["low"] is ratio["high"] is None, "of 2 rounds"
    by_name = {row["contender"]: row for row in found[:half]}
    assert by_name["moco_eager"]["ratio_to_moco_eager"] == {"median": 1, "low": None, "high": None}
    norms = {name: row["bn"] for name, row in by_name.items()}
    assert (norms["moco_eager"], norms["moco_eager_split"], norms["moco"]) == ("plain", "folded 4", "split 4")
    assert norms["synco bn.mode=plain"] == "plain" and by_name["synco trainer.precision=bf16"]["precision"] == "bf16"
    assert by_name["moco_eager"]["speed"] is None and by_name["synco"]["speed"]["channels_last"]
    assert not by_name["synco speed.channels_last=false"]["speed"]["channels_last"]
    assert by_name["mochi"]["counts"] == [4, 0, 16, 0, 0, 0] and by_name["moco"]["N"] == 0
    printed = capsys.readouterr().out
    assert "resnet10_narrow, imagenet stem, 32 px, batch 16, K 512, D 64, t 0.2, fp32" in printed
    assert "fewer than 6 rounds: no interval" in printed and "[" not in printed


def test_six_rounds_have_an_interval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for row in quick(tmp_path, "--only", "moco_eager,moco", "--rounds", "6"):
        ratio = row["ratio_to_moco_eager"]
        assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
    printed = capsys.readouterr().out
    assert "1.00 [1.00, 1.00]" in printed and "no interval" not in printed


def test_only_what_can_run_is_ablated() -> None:
    keys = {precision: set(ablated_keys(config(precision=precision), CPU)) for precision in ("bf16", "fp32")}
    assert keys["bf16"] - keys["fp32"] == {"speed.key_twin=true", "trainer.precision=fp32"}


def test_no_contender_is_left_uncompiled_without_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They share a code object, and torch.compile compiles one 8 times unless told otherwise."""
    compiled = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        compiled.append(graph)
        return graph.forward

    def added(number: int) -> Contender:
        add = torch.compile(lambda to, number: to + number, backend=backend, dynamic=False)
        return Contender("moco", lambda made, *_: Built(lambda: add(torch.zeros(3), number).sum(), made))

    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", False)
    monkeypatch.setattr(step, "contenders", lambda *_: {f"number {number}": added(number) for number in range(66)})
    found = quick(tmp_path)
    failed = [row for row in found if row["n"] == 0]
    assert len(compiled) == 64 and [row["contender"] for row in failed] == ["number 64", "number 65"]
    assert all("recompile_limit" in row["skipped"] for row in failed)


def test_everyone_takes_bf16(tmp_path: Path) -> None:
    found = quick(tmp_path, "--precision", "bf16")
    assert len(found) == 7 and not any("skipped" in row for row in found)
    assert {row["precision"] for row in found} == {"bf16"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_contenders_run(tmp_path: Path) -> None:
    [row] = quick(tmp_path, "--only", "moco_compiled")
    assert "skipped" not in row and row["ratio_to_moco_eager"] is None


def test_a_loss_that_is_not_finite_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = random_batches(config(), CPU)
    for views in batches.contiguous:
        views[0].fill_(float("inf"))
    monkeypatch.setattr(step, "random_batches", lambda *_: batches)
    found = {row["contender"]: row for row in quick(tmp_path, "--only", "moco_eager,moco")}
    assert "its loss is not finite" in found["moco_eager"]["skipped"] and "skipped" not in found["moco"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (["--batch", "4"], "bn.group_size = 4: a process's 4 samples must divide into 2 or more whole groups"),
        (["--arch", "resnet81"], "no such encoder; did you mean resnet18?"),
        (["--n-hard", "600"], "negatives.n_hard = 600: must be at most queue.size = 512"),
        (["--rounds", "0"], "--rounds must be >= 1, got 0"),
        (["--n-hard", "0"], "--n-hard must be >= 1, got 0"),
        (["--data", "nowhere"], "nowhere"),
        (["--device", "cuda"], "--device cuda: PyTorch finds no CUDA device here; use --device cpu"),
    ),
)
def test_bad_arguments_are_named(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert step.main(["--quick", "--output", str(tmp_path / "rows.jsonl"), *arguments]) == 1
    error = capsys.readouterr().err
    assert "error: " in error and message in error


def test_unknown_contenders_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        step.main(["--only", "moco,moko"])
    assert "unknown contender 'moko'" in capsys.readouterr().err
