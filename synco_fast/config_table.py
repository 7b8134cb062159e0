"""Writes docs/configuration.md from the schema: python -m synco_fast.config_table > docs/configuration.md"""

import json
from typing import Any

from synco_fast.config import COUNT_MAX, PRESETS, Config, Negatives, Section

_HEAD = """\
# Configuration

Every key of a configuration file, written by `python -m synco_fast.config_table > docs/configuration.md`.

A file holds only what differs from the defaults. `--set section.key=value` goes on top of it, in order, and
`--print-config` shows the outcome. Unknown keys, wrong types and combinations that cannot work are refused before
anything is built or written. Whole numbers are limited to 2^31 - 1, `seed` to 2^63 - 1.
"""


def markdown() -> str:
    """The whole page."""
    sections, plain = {}, []
    schema = Config.model_json_schema()
    for name, field in Config.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            sections[name] = field.annotation
        else:
            plain.append(_row(name, schema["properties"][name]))
    parts = [_HEAD, _table(plain)]
    for name, section in sections.items():
        keys = section.model_json_schema()["properties"].items()
        parts += [f"## {name}\n", f"{section.__doc__}\n", _table([_row(f"{name}.{key}", text) for key, text in keys])]
        parts += [_presets()] if section is Negatives else []
    return "\n".join(parts)


def _table(rows: list[str]) -> str:
    return "\n".join(["| key | default | values | meaning |", "| --- | --- | --- | --- |", *rows, ""])


def _row(path: str, schema: dict[str, Any]) -> str:
    default = json.dumps(schema["default"]).strip('"')
    meaning = schema["description"].replace("<", "&lt;")
    return f"| `{path}` | {default} | {_values(schema)} | {meaning} |"


def _values(schema: dict[str, Any]) -> str:
    """What a key takes, in words, from its JSON schema."""
    if "anyOf" in schema:
        return " or ".join(map(_values, schema["anyOf"]))
    if "const" in schema:
        return str(schema["const"])
    if "enum" in schema:
        return ", ".join(schema["enum"])
    if schema["type"] == "array":
        return f"list of: {_values(schema['items'])}"
    words = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true, false", "null": "null"}
    limits = [("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="), ("exclusiveMaximum", "<")]
    bounds = [f"{sign} {schema[key]:g}" for key, sign in limits if schema.get(key, COUNT_MAX) < COUNT_MAX]
    return " ".join([words[schema["type"]], ", ".join(bounds)]).strip()


def _presets() -> str:
    """How the methods' defaults differ from those in the table."""
    lines = []
    for method, hard in PRESETS.items():
        differing = [
            f"{key} {getattr(hard, key)}"
            for key, field in Negatives.model_fields.items()
            if getattr(hard, key, field.default) != field.default
        ]
        lines.append(f"- `method: {method}`: {', '.join(differing) or 'as above'}")
    return "\n".join(["Defaults by method:\n", *lines, ""])


if __name__ == "__main__":
    print(markdown(), end="")
