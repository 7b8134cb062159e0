"""Random cases by number, so that a failure names the one case that repeats it."""

import io
import math
import random
import re
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from synco_fast import config, config_text
from synco_fast.data.index import scan
from synco_fast.data.samples import close_shards, read_bytes
from synco_fast.engine import checkpoints
from synco_fast.errors import UserError
from synco_fast.ops import KINDS, HardNegatives, backends, infonce
from tests.engine.runs import differences
from tests.formats import example, framed, write_tar

_CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
_VALUES = [None, True, -1, 0, 1, 3, 10**30, 0.5, -0.5, float("nan"), float("inf"), "", "synco", "../x", "1e-3"]
_VALUES += [[], [1, 2], {}, {"a": 1}, "\u0000", "é" * 300]


def op_case(number: int) -> None:
    """One random problem in float64: loss, gradient, ranks and statistics of `eager` equal those of `reference`."""
    pick = random.Random(number)
    torch.manual_seed(number)
    batch, size, dim = pick.randint(1, 24), pick.randint(1, 400), pick.choice([2, 3, 16, 64, 100])
    counts = {kind: pick.choice([0, 1, pick.randint(2, 40)]) for kind in KINDS}
    hard = HardNegatives(
        n_hard=pick.randint(1, size),
        **counts,
        alpha_max=pick.random(),
        beta_max=1 + 2 * pick.random(),
        gamma_max=pick.random(),
        sigma=pick.choice([0.0, 0.01, 1.0]),
        delta=pick.choice([0.0, 0.01, 1.0]),
        eta=pick.choice([0.0, 0.01, 1.0]),
        extrapolate_from=pick.choice(["query", "negative"]),  # type: ignore[arg-type]
    )
    q, k, queue = (F.normalize(torch.randn(n, dim, dtype=torch.float64), dim=1) for n in (batch, batch, size))
    if pick.random() < 0.2:  # a collapsed queue: ties everywhere
        queue = queue[:1].expand(size, dim).clone()
    labels = {}
    if pick.random() < 0.3:
        labels = {"labels": torch.randint(0, 3, (batch,)), "queue_labels": torch.randint(0, 3, (size,))}
    temperature = pick.choice([0.02, 0.07, 0.2, 1.0])
    found = []
    for backend in ("reference", "eager"):
        leaf = q.clone().requires_grad_()
        result = infonce(
            leaf,
            k,
            queue,
            hard=hard,
            temperature=temperature,
            seed=number,
            step=number % 97,
            row_offset=number % 13,
            backend=backend,
            **labels,
        )
        found.append((result, *torch.autograd.grad(result.loss, leaf)))
    (expected, expected_gradient), (result, gradient) = found
    assert abs(float(result.loss.detach() - expected.loss.detach())) <= 1e-12 * max(1.0, float(expected.loss.detach()))
    scale = max(1.0, float(expected_gradient.abs().max()))
    assert float((gradient - expected_gradient).abs().max()) <= 1e-12 * scale
    assert torch.equal(result.rank, expected.rank)
    for name, value in expected.stats.items():
        assert abs(float(result.stats[name] - value)) <= 1e-6, name


_TENSORS: list[Callable[[torch.Tensor, random.Random], Any]] = [
    lambda rows, pick: rows.to(pick.choice(_DTYPES)),
    lambda rows, pick: rows[: pick.randrange(len(rows) + 1)],
    lambda rows, pick: rows[..., : pick.randrange(rows.shape[-1] + 1)],
    lambda rows, pick: rows[None],
    lambda rows, pick: rows.mT if rows.ndim == 2 else rows,
    lambda rows, pick: rows.repeat_interleave(2, dim=-1)[..., ::2],  # the same, not contiguous
    lambda rows, pick: rows[:1].expand_as(rows),
    lambda rows, pick: rows * pick.choice([0, 1e30, math.nan, math.inf, -1]),
    lambda rows, pick: rows.to("meta"),
    lambda rows, pick: rows.to_sparse(),
    lambda rows, pick: pick.choice([None, rows.tolist(), rows.numpy(), 3, "cpu"]),
]
_DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.int64, torch.bool]
_DTYPES += [torch.complex64, torch.float8_e4m3fn]
_NUMBERS = [*_VALUES, 2**31, 2**63, -(2**40), 1e-30, 1e30, "17", torch.tensor(3), torch.tensor([1.5, 2.0])]


def argument_case(number: int) -> bool:
    """One call of the op, one or two of whose arguments were changed: it is refused by an error that names one of them,
    or takes them. Says whether it did."""
    pick = random.Random(number)
    torch.manual_seed(number)
    settings: dict[str, Any] = {"n_hard": 16, **dict.fromkeys(KINDS, 4), "alpha_max": 0.5, "beta_max": 1.5}
    settings |= {"gamma_max": 0.5, "sigma": 0.01, "delta": 0.01, "eta": 0.01, "extrapolate_from": "query"}
    tensors = {name: F.normalize(torch.randn(rows, 16), dim=1) for name, rows in (("q", 5), ("k", 5), ("queue", 40))}
    if pick.random() < 0.3:
        tensors |= {"labels": torch.randint(0, 3, (5,)), "queue_labels": torch.randint(0, 3, (40,))}
    arguments: dict[str, Any] = {
        "temperature": 0.2,
        "seed": 0,
        "step": 0,
        "row_offset": 0,
        "backend": "auto",
        **tensors,
    }
    usable = [name for name, state in backends().items() if state == "ok"]
    arguments["backend"] = pick.choice(["auto", "eager"] if "labels" in tensors else ["auto", *usable])
    changed = pick.sample([*settings, *arguments, *tensors], pick.choice([1, 1, 2]))
    for name in changed:
        if name in tensors:
            arguments[name] = pick.choice(_TENSORS)(tensors[name], pick)
        else:
            (settings if name in settings else arguments)[name] = pick.choice(_NUMBERS)
    try:
        result = infonce(hard=HardNegatives(**settings), **arguments)
    except (TypeError, ValueError) as error:
        assert any(re.search(rf"\b{name}(_labels)?\b", str(error)) for name in changed), f"{changed}: {error}"
        return False
    assert result.loss.shape == () and result.rank.shape == (len(arguments["q"]),)
    return True


def config_case(number: int) -> bool:
    """One mutated configuration: it loads, or it is refused by a UserError of one screen. Says whether it loaded."""
    pick = random.Random(number)
    values = config_text.read_yaml(pick.choice(_CONFIGS))  # for which 1e-4 is a number
    for _ in range(pick.randint(1, 4)):
        _mutate(values, pick)
    try:
        config.parse(values, "fuzz")
    except UserError as error:
        message = str(error)
        assert message.startswith("fuzz: ") and len(message.splitlines()) <= 40, message
        return False
    return True


def _mutate(values: dict[str, Any], pick: random.Random) -> None:
    """Change, add or drop one key: to what its schema knows, at its bounds and beyond them, or to anything; or a key
    that is not there."""
    path, schema = pick.choice(_LEAVES)
    section, _, key = path.rpartition(".")
    target = values.setdefault(section, {}) if section else values
    if not isinstance(target, dict):  # of an earlier mutation
        return
    kind = pick.random()
    if kind < 0.15:
        target.pop(key, None)
    elif kind < 0.6:
        target[key] = pick.choice(_of_schema(schema))
    elif kind < 0.9:
        target[key] = pick.choice(_VALUES)
    elif kind < 0.95:
        target["nonsense"] = 1
    elif section:
        values[section] = pick.choice(_VALUES)


def _leaves() -> list[tuple[str, dict[str, Any]]]:
    """Every key of a configuration with its part of the schema."""
    whole = config.Config.model_json_schema()
    found = []
    for name, part in whole["properties"].items():
        inner = whole["$defs"][part["$ref"].rpartition("/")[2]]["properties"] if "$ref" in part else None
        found += [(name, part)] if inner is None else [(f"{name}.{key}", schema) for key, schema in inner.items()]
    return found


_LEAVES = _leaves()


def _of_schema(schema: dict[str, Any]) -> list[Any]:
    """What a key takes, and what lies just outside."""
    found = [schema["default"]] if "default" in schema else []
    for part in [schema, *schema.get("anyOf", ())]:
        found += part.get("enum", ())
        found += [True, False] if part.get("type") == "boolean" else []
        for name in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
            if name in part:
                bound = part[name]
                found += [bound, bound - 1, bound + 1, bound * (1 - 1e-9), bound * (1 + 1e-9)]
    return found or _VALUES


def checkpoint_case(number: int, folder: Path) -> bool:
    """One checkpoint with damaged bytes: refused by a UserError, or it holds what it held. Says whether it loaded.

    A third of them are whole archives whose pickle is damaged, which checksums do not tell: whatever they hold, nothing
    is executed.
    """
    pick = random.Random(number)
    path = folder / "given.pt"
    deep = number % 3 == 0
    path.write_bytes(_with_another_pickle(_checkpoint(), pick) if deep else damaged(_checkpoint(), pick))
    with Executions() as executed:
        try:
            found = checkpoints.load(path)
        except UserError as error:
            assert str(error).startswith(str(path)) and len(str(error)) < 1000, error
            found = None
    assert not executed.events, executed.events
    if found is not None and not deep:
        assert differences(found, _state()) == [], "another state, and nobody told"
    return found is not None


def shard_case(number: int, folder: Path) -> bool:
    """One damaged tar or TFRecord file, or list of a tar file's images: refused, or an index of what lies within it."""
    pick = random.Random(number)
    whole = {"x.tar": _tar(), "x.tfrecord": _tfrecord(), "list.tsv": _list()}
    path = folder / pick.choice(list(whole))
    content = damaged(whole[path.name], pick)
    (folder / "x.tar").write_bytes(whole["x.tar"])
    path.write_bytes(content)
    limit = max(len(content), len(whole["x.tar"]))
    with Executions() as executed:
        try:
            index = scan(path)
        except UserError as error:
            assert str(error).count(str(folder)) >= 1 and len(str(error)) < 1000, error
            index = None
    assert not executed.events, executed.events
    if index is not None:
        for i in range(len(index)):
            assert index.sample(i).path.parent == folder and 0 <= len(read_bytes(index.sample(i))) <= limit
        close_shards()
    return index is not None


def damaged(content: bytes, pick: random.Random) -> bytes:
    """With some bytes changed, left out, put in, zeroed or moved."""
    found = bytearray(content)
    for _ in range(pick.choice([1, 1, 1, 2, 8])):
        at, length = pick.randrange(len(found)), pick.choice([1, 4, 64, 512])
        kind = pick.randrange(6)
        if kind <= 1:
            found[at] ^= 1 << pick.randrange(8)
        elif kind == 2:
            found[at : at + length] = pick.randbytes(length)
        elif kind == 3:
            del found[at : at + length]
        elif kind == 4:
            found[at:at] = found[pick.randrange(len(found)) :][:length]
        else:
            del found[at:]
        if not found:
            return b""
    return bytes(found)


class Executions:
    """Notes what is executed while it is entered: programs, code, and functions that a pickle names."""

    EVENTS = (
        "os.system",
        "os.exec",
        "os.posix_spawn",
        "os.fork",
        "subprocess.Popen",
        "exec",
        "socket.connect",
        "os.mkdir",
    )
    _watching: "Executions | None" = None
    _hooked = False

    def __enter__(self) -> "Executions":
        self.events: list[str] = []
        if not Executions._hooked:  # for good: an audit hook cannot be taken away
            sys.addaudithook(Executions._note)
            Executions._hooked = True
        Executions._watching = self
        return self

    def __exit__(self, *error: object) -> None:
        Executions._watching = None

    @staticmethod
    def _note(event: str, arguments: Any) -> None:
        if event == "exec" and not getattr(arguments[0], "co_filename", "<").startswith("<"):
            return  # a module that is imported
        if Executions._watching is not None and event in Executions.EVENTS:
            Executions._watching.events.append(f"{event} {arguments!r}"[:200])


def _state() -> dict[str, Any]:
    names = ("config", "data", "loader", "model", "optimizer", "meter", "rng")
    model = {f"layer{i}.weight": torch.arange(200.0) + i for i in range(4)}
    return {name: {"step": i, "text": name} for i, name in enumerate(names)} | {"step": 3, "model": model}


def _checkpoint() -> bytes:
    content = io.BytesIO()
    torch.save(_state(), content)
    return content.getvalue()


def _with_another_pickle(content: bytes, pick: random.Random) -> bytes:
    found = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(found, "w") as new:
        for name in old.namelist():
            inner = old.read(name)
            if name.endswith("data.pkl"):
                inner = damaged(inner, pick)
                if pick.random() < 0.3:  # a call of a function, put where an opcode may begin
                    at = pick.randrange(len(inner) + 1)
                    inner = inner[:at] + b"cposix\nsystem\n(S'true'\ntR" + inner[at:]
            new.writestr(name, inner)
    return found.getvalue()


def _tar() -> bytes:
    content = io.BytesIO()
    members = [(f"{i:03d}.{kind}", data) for i in range(4) for kind, data in (("jpg", b"x" * (100 + i)), ("cls", b"1"))]
    write_tar(content, members)
    return content.getvalue()


def _list() -> bytes:
    """Of the images of `_tar`, each of whose members takes a block for its header and one for its content."""
    lines = [
        f"# shard\tx.tar\t{len(_tar())}",
        *(f"x.tar\t1\t{2048 * i + 512}\t{100 + i}\t{i:03d}.jpg" for i in range(4)),
    ]
    return "".join(f"{line}\n" for line in lines).encode()


def _tfrecord() -> bytes:
    features = [{"image/encoded": b"x" * (100 + i), "image/class/label": [i]} for i in range(4)]
    return b"".join(framed(example(feature)) for feature in features)
