"""Configuration as text: reading YAML, applying overrides, and saying what is wrong with a key."""

import difflib
import re
import reprlib
from pathlib import Path
from typing import Any

import yaml

from synco_fast.errors import UserError

_MOST = 15
"""Problems listed in one error."""

# Nested YAML aliases are small until they are written out; this stops after a few levels.
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother, _REPR.maxlong = 3, 60, 60, 60


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a number (YAML 1.1 wants 1.0e-4) and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes text which _Loader would read as a number."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file of nested keys.

    Raises:
        UserError: it is not there, not YAML, or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot read the configuration: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: the configuration is not text in UTF-8") from error
    values = _parse(text, str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected keys and values at the top level, got {type(values).__name__}")
    return values


def to_yaml(values: dict[str, Any]) -> str:
    """Nested keys as YAML that `read_yaml` reads as the same values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)


def apply_override(values: dict[str, Any], override: str) -> None:
    """Apply `a.b=c` in place; c is read as YAML. The schema judges the key afterwards."""
    path, equals, text = override.partition("=")
    if not equals or not all(path.strip().split(".")):
        raise UserError(f"--set {override}: expected KEY=VALUE, for example --set data.image_size=96")
    set_key(values, path.strip(), _parse(text, f"--set {override}"), f"--set {override}")


def set_key(values: dict[str, Any], path: str, value: Any, source: str) -> None:
    """Set `a.b` in place. `source` names it in errors."""
    *sections, last = path.split(".")
    for key in sections:
        inner = values.setdefault(key, {})
        if not isinstance(inner, dict):
            raise UserError(f"{source}: {key} is a value ({inner!r}), not a section")
        values = inner
    values[last] = value


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted path."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def describe(item: Any, paths: dict[str, str]) -> str:
    """One of pydantic's errors as a line: the key's path, its value, what is allowed, the nearest key."""
    path = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"{path} = {_shorten(item['input'])}: no such key{_nearest(path, paths)}"
    if item["type"] == "model_type":
        return f"{path} = {_shorten(item['input'])}: expected a section of keys"
    expected = item["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    meaning = f" ({paths[path]})" if paths.get(path) else ""
    return f"{path} = {_shorten(item['input'])}: expected {expected}{meaning}"


def listing(title: str, problems: list[str]) -> UserError:
    """An error that lists problems, as many as fit a screen."""
    more = [f"... and {len(problems) - _MOST} more"] if len(problems) > _MOST else []
    return UserError("\n  ".join([title, *problems[:_MOST], *more]))


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise UserError(f"{source}: not valid YAML: {problem}{where}") from error


def _nearest(path: str, paths: dict[str, str]) -> str:
    """The valid key that looks most like this one: by its whole path, or by its last part."""
    candidates = paths if "." in path else {name.partition(".")[0] for name in paths}
    matches = difflib.get_close_matches(path, candidates, n=1, cutoff=0.7)
    if not matches:
        by_name: dict[str, list[str]] = {}
        for name in paths:
            by_name.setdefault(name.rpartition(".")[2], []).append(name)
        close = difflib.get_close_matches(path.rpartition(".")[2], by_name, n=1)
        matches = by_name[close[0]] if close else []
    return f"; did you mean {' or '.join(matches)}?" if matches else "; docs/configuration.md lists the keys"


def _shorten(value: Any) -> str:
    text = _REPR.repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
