"""The kernel benchmark computes what it says it times, and its rows and figures are whole. No timing is asserted."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import contenders, kernels, measure, memory, plots, rows
from bench.about import default_output
from bench.case import Case
from bench.published import Pick, Picks, moco, published, published_vectorised, random_picks
from synco_fast.errors import UserError
from synco_fast.ops import KINDS, HardNegatives, synthesize
from synco_fast.ops.draws import draw
from tests.conftest import REPOSITORY, environment
from tests.ops.cases import SETTINGS, batch, rounding_floor, run

TEMPERATURE, SEED, STEP = 0.2, 7, 11
SYNTHETIC = [name for name, hard in SETTINGS.items() if hard.total]
EVERYTHING = SETTINGS["all"]
ROWS = 5


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def bench(module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command of the benchmark to its end."""
    command = [sys.executable, "-m", f"bench.{module}", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=REPOSITORY, check=False)


def floor() -> tuple[float, float]:
    """`rounding_floor` for float64: its eps is 2^-52 where float32's is 2^-23."""
    loss, gradient = rounding_floor(TEMPERATURE, ROWS)
    return loss * 2.0**-29, gradient * 2.0**-29


def picks_of_the_op(q: Tensor, queue: Tensor, hard: HardNegatives) -> Pick:
    """The op's own parents, coefficients and noise."""
    sets = synthesize(q, queue, hard=hard, seed=SEED, step=STEP)

    def pick(kind: str, hard: HardNegatives, hard_rows: Tensor, anchor: Tensor) -> Picks:
        parents = sets[kind].parents
        for of_row, top in zip(parents, hard_rows, strict=True):
            assert set(of_row.flatten().tolist()) <= set(top.tolist())
        noise = draw(
            kind,
            hard,
            seed=SEED,
            step=torch.tensor(STEP),
            rows=torch.arange(len(anchor)),
            n_hard=hard.n_hard,
            like=anchor.detach(),
        ).noise
        return Picks(parents, sets[kind].coefficients[..., None], noise)

    return pick


def differentiated(q: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    leaf = q.clone().requires_grad_()
    value = loss(leaf)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value, gradient


@pytest.mark.parametrize("loss", (published, published_vectorised))
@pytest.mark.parametrize("setting", SYNTHETIC)
def test_published_losses_with_the_ops_draws_are_the_op(setting: str, loss: Callable[..., Tensor]) -> None:
    hard, (q, k, queue) = SETTINGS[setting], batch(ROWS)
    pick = picks_of_the_op(q, queue, hard)
    value, gradient = differentiated(q, lambda leaf: loss(leaf, k, queue, hard, TEMPERATURE, pick))
    out, expected = run("reference", q, k, queue, hard=hard, temperature=TEMPERATURE, seed=SEED, step=STEP)
    of_loss, of_gradient = floor()
    assert abs(value - out.loss) <= 2 * of_loss
    assert (gradient - expected).norm() <= 2 * of_gradient


def test_moco_is_the_op_without_synthetic_negatives() -> None:
    q, k, queue = batch(ROWS)
    value, gradient = differentiated(q, lambda leaf: moco(leaf, k, queue.T.contiguous(), TEMPERATURE))
    out, expected = run("reference", q, k, queue, hard=HardNegatives.none(), temperature=TEMPERATURE)
    of_loss, of_gradient = floor()
    assert abs(value - out.loss) <= 2 * of_loss
    assert (gradient - expected).norm() <= 2 * of_gradient


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_autograd_and_closed_forms_give_the_same_bits(dtype: torch.dtype) -> None:
    q, k, queue = (tensor.to(dtype) for tensor in batch(ROWS))
    losses = []
    for loss in (published, published_vectorised):
        torch.manual_seed(0)
        losses.append(loss(q, k, queue, EVERYTHING, TEMPERATURE))
    assert torch.equal(*losses)
    torch.manual_seed(1)
    assert not torch.equal(losses[0], published(q, k, queue, EVERYTHING, TEMPERATURE))


def test_published_asks_autograd_once_for_each_perturbed_and_adversarial_sample(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls, grad = [], torch.autograd.grad

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        return grad(*arguments, **options)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    q, k, queue = batch(ROWS)
    published(q, k, queue, EVERYTHING, TEMPERATURE)
    assert len(calls) == EVERYTHING.perturbed + EVERYTHING.adversarial
    published_vectorised(q, k, queue, EVERYTHING, TEMPERATURE)
    assert len(calls) == EVERYTHING.perturbed + EVERYTHING.adversarial


@pytest.mark.parametrize("kind", KINDS)
def test_random_picks_are_hard_rows_and_coefficients_in_range(kind: str) -> None:
    q, _, queue = batch(ROWS)
    hard = replace(HardNegatives.none(), n_hard=4, **{kind: 500})
    hard_rows = torch.topk(q @ queue.T, 4, dim=1).indices
    picks = random_picks(kind, hard, hard_rows, q)
    assert picks.parents.shape == (ROWS, 500, 2 if kind == "mixed" else 1)
    for of_row, top in zip(picks.parents, hard_rows, strict=True):
        for parent in of_row.unbind(-1):
            # 500 draws of 4: one is missed with probability 4 (3/4)^500.
            assert set(parent.tolist()) == set(top.tolist())
    if kind == "mixed":
        assert (picks.parents[..., 0] != picks.parents[..., 1]).any()
    low, high = {"interpolated": (0, 0.5), "extrapolated": (1, 1.5), "mixed": (0, 1)}.get(kind, (0, 0))
    assert low <= picks.coefficients.min() <= picks.coefficients.max() <= high
    assert picks.coefficients.max() - picks.coefficients.min() >= 0.9 * (high - low)
    assert (picks.noise is not None) == (kind == "noisy")


def case(contender: str, hard: HardNegatives, dtype: str = "float16", **sizes: int) -> Case:
    return Case(contender, "", sizes.get("batch", 256), sizes.get("queue", 65536), 128, hard, 0.2, dtype, "cpu")


def test_a_case_survives_its_trip_to_a_child_process() -> None:
    there = case("published", replace(HardNegatives.synco(), extrapolate_from="negative"))
    assert Case.from_json(there.to_json()) == there


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory on a CPU is read from /proc")
def test_memory_of_plain_moco_is_some_copies_of_its_logits() -> None:
    plain = case("moco_eager", HardNegatives.none(), "float32", batch=64)
    extra = memory.of_case_on_cpu(plain, threads=1)
    # In the backward pass: log-probabilities, their gradient and the logits' gradient, (B, K) each, and the queue's
    # clone. Never six: the logits are gone by then. The kernel's count is good to about a megabyte.
    logits, clone = 64 * 65536 * 4, 65536 * 128 * 4
    assert extra is not None
    assert 2 * logits + clone - 2e6 <= extra <= 5 * logits + clone + 2e6


def test_memory_of_a_case_that_fails_says_why() -> None:
    with pytest.raises(memory.Failed, match="n_hard must be at most the queue's 512 rows, got 1024"):
        memory.of_case_on_cpu(case("eager", HardNegatives.synco(), queue=512), threads=1)


def test_rounds_run_every_step_and_end_when_the_time_is_over() -> None:
    calls: list[str] = []
    steps = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    times = measure.interleaved(steps, "cpu", warm_up=2, rounds=5, seconds=60)
    assert {name: len(of_step) for name, of_step in times.items()} == {"a": 5, "b": 5, "c": 5}
    assert sorted(calls[6:9]) == sorted(calls[9:12]) == ["a", "b", "c"] and len(calls) == 21
    assert len({tuple(calls[at : at + 3]) for at in range(6, 21, 3)}) > 1
    assert len(measure.interleaved(steps, "cpu", warm_up=0, rounds=9, seconds=0)["a"]) == 3


def test_quantiles() -> None:
    assert measure.quantiles([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == (3.5, 2.0, 5.0, 6)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Rows of a quick run of all contenders there are, then of two sweeps with some of them; and what was printed."""
    path = tmp_path_factory.mktemp("bench") / "rows" / "kernels.jsonl"
    printed = []
    for arguments in (
        ["--no-memory"],
        ["--sweep", "kinds", "--no-memory", "--only", "moco_eager,published,eager"],
        ["--sweep", "counts", "--no-memory", "--only", "moco_eager,eager"],
        ["--sweep", "dim", "--only", "moco_eager"],
    ):
        done = bench("kernels", "--quick", "--device", "cpu", "--output", path, *arguments)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
    return path, "\n".join(printed)


def test_quick_run_has_a_whole_row_for_each_contender(results: tuple[Path, str]) -> None:
    found = [row for row in rows.read(results[0]) if row["sweep"] == "default"]
    assert {row["contender"] for row in found} == set(contenders.CONTENDERS)
    for row in found:
        reason = contenders.absent(row["contender"], "cpu")
        assert row.get("skipped") == reason, row
        if reason is not None:
            assert row["median_ms"] is None and row["setting"] == ""
            continue
        assert list(row) == list(rows.FIELDS)
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] and row["n"] == 2
        floor_ms = 1e3 * max(row["flops"] / row["peak_flops"], row["bytes"] / row["peak_bandwidth"])
        # Stored to 5 digits each: a number is off by up to 5e-5 of itself, and three take part.
        assert row["floor_ms"] == pytest.approx(floor_ms, rel=2e-4)
        assert row["share_of_floor"] == pytest.approx(row["floor_ms"] / row["median_ms"], rel=2e-4)
        assert (row["B"], row["K"], row["D"], row["dtype"]) == (8, 512, 64, "float32")
        assert set(row["versions"]) == {"torch", "python", "synco_fast", "triton", "cuda"}
    settings = {(row["contender"], row["setting"]): (row["N"], row["counts"]) for row in found}
    assert settings["published", "synco"] == settings["eager", "synco"] == (32, [8, 8, 8, 4, 4, 4])
    assert settings["moco_eager", "moco"] == settings["eager", "moco"] == (0, [0] * 6)
    assert settings["eager", "mochi"] == (32, [4, 0, 16, 0, 0, 0])


def test_sweeps_vary_what_they_say(results: tuple[Path, str]) -> None:
    found = rows.read(results[0])
    counts = {(row["contender"], row["setting"], row["x"]): row for row in found if row["sweep"] == "counts"}
    assert counts["eager", "synco", 0]["counts"] == [0] * 6
    assert counts["eager", "synco", 1]["counts"] == [8, 8, 8, 4, 4, 4]
    dims = [row for row in found if row["sweep"] == "dim"]
    assert [row["D"] for row in dims] == [row["x"] for row in dims] == [64, 128]
    if sys.platform == "linux":
        assert all(row["peak_extra_bytes"] is not None for row in dims)
    alone = {row["setting"]: row["counts"] for row in found if row["sweep"] == "kinds"}
    assert list(alone) == ["moco", *KINDS]
    for at, kind in enumerate(KINDS):
        assert [number for number, count in enumerate(alone[kind]) if count] == [at]


def test_the_table_names_absent_backends_with_the_reason(results: tuple[Path, str]) -> None:
    printed = results[1]
    assert "default: B 8, K 512, D 64, N 32, t 0.2" in printed
    assert any(line.split()[:1] == ["published"] and line.split()[1] == "noisy" for line in printed.splitlines())
    assert "Triton's interpreter is not worth timing" in printed
    (line,) = [line for line in printed.splitlines() if line.startswith("cuda ")]
    assert "not a backend for cpu" in line


def test_plots_are_drawn_from_rows(results: tuple[Path, str], tmp_path: Path) -> None:
    found = rows.read(results[0])
    drawn = plots.draw(found, tmp_path)
    assert [path.name.partition("-")[0] for path in drawn] == ["bars", "roofline", "kinds", "counts", "dim"]
    for path in drawn:
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000
    # A later run of the same replaces the earlier one, and another dtype stands beside it.
    later = [{**row, "date": "2999-01-01T00:00:00+00:00"} for row in found]
    other = [{**row, "dtype": "bfloat16"} for row in found]
    assert len(plots.draw([*later, *found], tmp_path / "later")) == 5
    assert len(plots.draw([*found, *({**row, "threads": 64} for row in other)], tmp_path / "other")) == 10


def test_plots_command_and_its_errors(
    results: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = bench("plots", results[0], "--output", tmp_path / "plots")
    assert done.returncode == 0 and len(done.stdout.splitlines()) == len(list((tmp_path / "plots").iterdir())) == 5

    without = tmp_path / "without.jsonl"
    rows.append(without, [row for row in rows.read(results[0]) if row["contender"] != "moco_eager"])
    assert plots.main([str(without), "--output", str(tmp_path / "no plots")]) == 1
    message = "error: these rows lack moco_eager, which the others are drawn against: run it with them\n"
    assert capsys.readouterr() == ("", message)

    assert plots.main([str(tmp_path / "nowhere.jsonl"), "--output", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "nowhere.jsonl" in error


@pytest.mark.parametrize(
    ("text", "message"),
    (
        ("{}\n", "line 1: expected a row of python -m bench.kernels; no sweep"),
        ("1\n", "line 1: expected a row"),
        ("{\n", "line 1: not JSON"),
    ),
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        rows.read(path)


def test_rows_without_times_draw_nothing(results: tuple[Path, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no row has a time"):
        plots.draw([row for row in rows.read(results[0]) if "skipped" in row], tmp_path)


def quick(tmp_path: Path, *arguments: str) -> list[rows.Row]:
    """Rows of a quick run in this process."""
    path = tmp_path / "rows.jsonl"
    code = kernels.main(
        ["--quick", "--device", "cpu", "--threads", "1", "--no-memory", "--output", str(path), *arguments]
    )
    assert code == 0
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_on_a_cpu_the_losses_in_pytorch_keep_float32_for_float16(tmp_path: Path) -> None:
    found = quick(tmp_path, "--dtype", "float16", "--only", "moco_eager,published,eager")
    dtypes = {row["contender"]: row["dtype"] for row in found}
    assert dtypes == {"moco_eager": "float32", "published": "float32", "eager": "float16"}


def test_bfloat16_is_everyones(tmp_path: Path) -> None:
    found = quick(tmp_path, "--dtype", "bfloat16", "--only", "moco_eager,published,published_vectorised,eager")
    assert {row["dtype"] for row in found} == {"bfloat16"}
    assert not any("skipped" in row for row in found)


def test_one_run_holds_several_dtypes(tmp_path: Path) -> None:
    found = quick(tmp_path, "--dtype", "bfloat16,float32", "--only", "moco_eager,published,eager")
    cases = [(row["contender"], row["setting"], row["dtype"]) for row in found]
    assert cases == [
        ("moco_eager", "moco", "bfloat16"),
        ("published", "synco", "bfloat16"),
        *(("eager", setting, dtype) for dtype in ("bfloat16", "float32") for setting in ("moco", "synco", "mochi")),
    ]
    assert len({row["date"] for row in found}) == 1
    figure = plots.bars(found)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == [f"{contender}, {dtype}, {setting}" for contender, setting, dtype in cases]
    fills = {line.get_label(): line.get_fillstyle() for line in plots.roofline(found).axes[0].lines}
    assert fills[f"eager, float32, moco: {found[5]['share_of_floor']:.0%} of its roof"] == "none"
    assert fills[f"eager, bfloat16, moco: {found[2]['share_of_floor']:.0%} of its roof"] == "full"
    names = [path.name for path in plots.draw(found, tmp_path / "plots")]
    assert all("bfloat16-float32" in name for name in names) and len(names) == 2


def test_a_row_is_judged_by_its_own_dtypes_product() -> None:
    yardstick = measure.Yardstick("cpu", ["float32", "float16", "bfloat16"], quick=True)
    assert set(yardstick.steps) == {"copy", "product float32", "product bfloat16"}
    times = {"copy": [2.0, 1.0], "product float32": [3.0, 2.0], "product bfloat16": [1.0, 4.0]}
    product, copied = 2 * 256**3, 2 * 2**24
    assert yardstick.peaks(times, "bfloat16") == pytest.approx((product * 1e3, copied * 1e3))
    # Nobody multiplies float16 on a CPU: float32's product is the best there is.
    assert yardstick.peaks(times, "float16") == yardstick.peaks(times, "float32")
    assert yardstick.peaks(times, "float32") == pytest.approx((product * 1e3 / 2, copied * 1e3))


def test_what_fails_at_one_point_is_a_row_that_says_so(tmp_path: Path) -> None:
    found = quick(tmp_path, "--sweep", "queue", "--n-hard", "300", "--only", "moco_eager,eager")
    failed = [row for row in found if "skipped" in row]
    assert [(row["contender"], row["setting"], row["K"]) for row in failed] == [("eager", "synco", 256)]
    assert failed[0]["skipped"] == "n_hard must be at most the queue's 256 rows, got 300"
    assert len(found) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (["--n-hard", "600"], "--n-hard must lie in [1, 512], the rows of the queue (--queue), got 600"),
        (["--batch", "0"], "--batch must be > 0, got 0"),
        (["--temperature", "nan"], "--temperature must be > 0, got nan"),
        (["--threads", "0"], "--threads must be >= 1, got 0"),
        (["--warm-up", "0"], "--warm-up must be >= 1, got 0"),
        (["--device", "cuda"], "--device cuda: PyTorch finds no CUDA device here; use --device cpu"),
    ),
)
def test_bad_arguments_are_named(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    code = kernels.main(["--quick", "--output", str(tmp_path / "rows.jsonl"), *arguments])
    assert (code, capsys.readouterr().err) == (1, f"error: {message}\n")


@pytest.mark.parametrize(
    "arguments",
    (["--only", "moco_eager,type4"], ["--dtype", "float32,float8"], ["--counts", "1,2"], ["--sweep", "moon"]),
)
def test_unknown_choices_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        kernels.main(arguments)
    assert arguments[0] in capsys.readouterr().err


def test_rows_go_to_a_file_named_by_device_and_date() -> None:
    about = {"device": "AMD EPYC 9V84 (TM)", "date": "2026-01-02T03:04:05+00:00"}
    assert default_output("kernels", about) == Path("bench/results/kernels-amd-epyc-9v84-tm-2026-01-02.jsonl")


def test_triton_is_timed_on_cuda_only_and_cpu_kernels_on_a_cpu_only() -> None:
    assert "interpreter" in (contenders.absent("triton", "cpu") or "")
    assert contenders.absent("cpu", "cuda") == "not a backend for cuda"
    assert contenders.absent("eager", "cpu") is None
