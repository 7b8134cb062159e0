"""What a sweep is: pretrainings that differ in a few keys, each repeated with several seeds and judged the same way.

A sweep's file becomes a `Plan`, which is checked to its end before anything starts: every run has its resolved
configuration, and every evaluation the options that the command line knows.
"""

import copy
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from synco_fast import config
from synco_fast.config import Config, PathText, Section
from synco_fast.config_text import describe, flatten, listing, read_yaml, set_key
from synco_fast.errors import UserError
from synco_fast.evaluation.journal import FILES as JOURNAL
from synco_fast.evaluation.session import RESULT
from synco_fast.evaluation.sweep_options import Evaluation, as_text, nearest

TABLE, REPORT = "table.md", "report.html"
OWN_LOCK, CHILDREN_LOCK = "sweep.lock", "children.lock"
PRETRAIN = "pretrain"
"""The first stage of each run; the others have the names of evaluations."""
ASKED, STATE, LOG = "asked.yaml", "stages.json", "log.txt"
"""What a sweep leaves in the folder of a run beside what its stages do."""
NOT_OF_A_RUN = {"output": "the sweep's --output", "seed": "the sweep's seeds", "data.root": "the sweep's --data"}
"""Keys that a run may not set, and what sets them."""
FILES = (RESULT, TABLE, REPORT, OWN_LOCK, CHILDREN_LOCK)
"""What a sweep leaves in its output folder beside the folders of its runs."""

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._=+,@ -]{0,198}[A-Za-z0-9_=+@-])?")
_TAKEN = {PRETRAIN, ASKED, STATE, LOG, "config.yaml", *JOURNAL}
_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9._=+,@-]")


class _Sweep(Section):
    config: Annotated[PathText, Field(description="base configuration, relative to the sweep's file")]
    seeds: Annotated[
        list[Annotated[int, Field(ge=0, lt=2**63)]], Field(min_length=1, description="each run is repeated with each")
    ]
    runs: dict[str, dict[str, Any]] | None = Field(None, description="overrides of each run, by its name")
    grid: dict[str, list[Any]] | None = Field(None, description="values of keys; every combination is a run")
    evaluate: dict[str, dict[str, Any]] = Field({}, description="options of evaluations, by name: a command's, or any")


@dataclass(frozen=True)
class Run:
    """One pretraining of a sweep.

    Attributes:
        name: of the run, shared by its seeds. overrides: of the base configuration, by key.
        config: resolved; `output` and `data.root` are still to be set.
    """

    name: str
    seed: int
    overrides: dict[str, Any]
    config: Config

    def __str__(self) -> str:
        return f"{self.name}, seed {self.seed}"

    def folder(self, output: Path) -> Path:
        return output / self.name / f"seed-{self.seed}"


@dataclass(frozen=True)
class Plan:
    """A sweep's file, checked.

    Attributes:
        source: the file. settings: what it says. runs: every name with every seed, in the file's order.
        evaluations: options by name. words: those of each evaluation's command line, the command first, places aside.
    """

    source: Path
    settings: dict[str, Any]
    runs: list[Run]
    evaluations: dict[str, dict[str, Any]]
    words: dict[str, list[str]]

    @property
    def stages(self) -> list[str]:
        """What is done for each run, in order."""
        return [PRETRAIN, *self.evaluations]


def read_plan(path: Path, commands: Mapping[str, Evaluation]) -> Plan:
    """Read a sweep's file and check all of it.

    Args:
        commands: the evaluations that there are, by name.

    Raises:
        UserError: listing what is wrong, by the name of the run where it is a run's.
    """
    settings = read_yaml(path)
    try:
        sweep = _Sweep.model_validate(settings)
    except ValidationError as error:
        paths = {name: field.description or "" for name, field in _Sweep.model_fields.items()}
        raise _refused(path, [describe(item, paths) for item in error.errors()]) from error
    if (sweep.runs is None) == (sweep.grid is None):
        raise _refused(path, [f"{'neither' if sweep.runs is None else 'both'} of runs and grid: expected one of them"])
    problems = [f"seeds: {seed} is given twice" for seed in sorted(_repeated(sweep.seeds))]
    named = list(sweep.runs.items() if sweep.runs is not None else _combinations(sweep.grid or {}, problems))
    if not named and not problems:
        problems.append(f"{'grid' if sweep.runs is None else 'runs'}: is empty; name at least one")
    problems += [problem for name, _ in named for problem in _name_problems(name)]
    words: dict[str, list[str]] = {}
    for name, given in sweep.evaluate.items():
        found = list(_evaluation_problems(name, given, commands))
        problems += found
        if not found:
            command, options = _told(name, given)
            words[name] = [command, *commands[command].words(options)]
    if problems:
        raise _refused(path, problems)

    base, runs = read_yaml(path.parent / sweep.config), []
    for name, overrides in named:
        try:
            runs += [Run(name, seed, overrides, _resolve(base, overrides, seed)) for seed in sweep.seeds]
        except UserError as error:
            problems += [f"{name}: {line.strip()}" for line in str(error).splitlines()]
    problems += dict.fromkeys(_preparation_problems(runs, sweep.evaluate))
    if problems:
        raise _refused(path, problems)
    return Plan(path, settings, runs, sweep.evaluate, words)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The keys in which two mappings of nested values differ, with both values."""
    old, new = flatten(dict(before)), flatten(dict(now))
    pairs = [(key, new.get(key, "not given"), old.get(key, "not given")) for key in sorted(old.keys() | new.keys())]
    return [f"{key} is {is_!r}, was {was!r}" for key, is_, was in pairs if is_ != was]


def recorded(settings: Config) -> dict[str, Any]:
    """A configuration as what was done under it is remembered: without the places of things."""
    values = settings.model_dump()
    del values["output"], values["data"]["root"]
    return values


def _refused(path: Path, problems: list[str]) -> UserError:
    return listing(f"{path}: the sweep cannot be run", problems)


def _resolve(base: dict[str, Any], overrides: dict[str, Any], seed: int) -> Config:
    """A run's configuration.

    Raises:
        UserError: with a line for each problem.
    """
    given = _nested(overrides)
    problems = [f"{key}: is set by {by}, not by a run" for key, by in NOT_OF_A_RUN.items() if _has(given, key)]
    if problems:
        raise UserError("\n".join(problems))
    values = copy.deepcopy(base)
    for key, value in overrides.items():
        set_key(values, key, copy.deepcopy(value), key)
    values["seed"] = seed
    try:
        return config.parse(values, "")
    except UserError as error:
        raise UserError(str(error).partition("\n")[2]) from error


def _nested(overrides: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in overrides.items():
        if not all(key.split(".")):
            raise UserError(f"{key!r}: expected a key, as in optim.lr")
        set_key(values, key, value, key)
    return values


def _has(values: dict[str, Any], path: str) -> bool:
    section, _, rest = path.partition(".")
    inner = values.get(section)
    return _has(inner, rest) if rest and isinstance(inner, dict) else section in values and not rest


def _combinations(grid: dict[str, list[Any]], problems: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every combination of values, the last key's changing fastest, under names made of keys and values."""
    problems += [f"grid.{key}: is empty; give at least one value" for key, values in grid.items() if not values]
    seen = set()
    for values in itertools.product(*grid.values()) if grid else ():
        overrides = dict(zip(grid, values, strict=True))
        name = " ".join(f"{key}={_NOT_IN_A_NAME.sub('', as_text(value))}" for key, value in overrides.items())
        if name in seen:
            problems.append(f"grid: two combinations have the name {name!r}; name them yourself, under runs")
        seen.add(name)
        yield name, overrides


def _name_problems(name: str) -> list[str]:
    if name in FILES:
        return [f"run {name!r}: the sweep has a file of that name; choose another"]
    if not _NAME.fullmatch(name):
        return [
            f"run {name!r}: a run's name is a folder's: at most 200 letters, digits and ._=+,@- or spaces, a letter or "
            "digit first, no dot, comma or space last"
        ]
    return []


def _told(name: str, given: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Command and options of an evaluation."""
    return given.get("command", name), {key: value for key, value in given.items() if key != "command"}


def _evaluation_problems(name: str, given: dict[str, Any], commands: Mapping[str, Evaluation]) -> Iterator[str]:
    """What is wrong with an evaluation of a sweep's file."""
    command, options = _told(name, given)
    if name in _TAKEN or not _NAME.fullmatch(name):
        yield f"evaluate.{name}: names a folder beside a run's {', '.join(sorted(_TAKEN))}, as a run's name does"
    elif not isinstance(command, str) or command not in commands:
        where = f"evaluate.{name}.command = {command!r}" if "command" in given else f"evaluate.{name}"
        yield f"{where}: no such evaluation{nearest(str(command), commands)}"
    else:
        yield from (f"evaluate.{name}{problem}" for problem in commands[command].problems(options))


def _preparation_problems(runs: list[Run], evaluations: dict[str, dict[str, Any]]) -> Iterator[str]:
    """What evaluations may not set of how a run's images are prepared."""
    for run, (name, options) in itertools.product(runs, evaluations.items()):
        given = options.get("set", [])
        try:
            config.prepare(run.config.data, list(map(as_text, given if isinstance(given, list) else [given])))
        except UserError as error:
            yield f"{run.name}: evaluate.{name}.set: {' '.join(str(error).split())}"


def _repeated(values: list[int]) -> set[int]:
    return {value for value in values if values.count(value) > 1}
