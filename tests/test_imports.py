"""Imports point one way: ops <- methods <- engine <- evaluation <- profiling <- cli.

data and models do not know methods.
"""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "synco_fast"
PROGRAMS = {"cli", "demo", "doctor"}
FORBIDDEN = {
    "ops": {"config", "data", "models", "methods", "engine", "evaluation", "profiling", "errors", "files", *PROGRAMS},
    "data": {"config", "models", "methods", "engine", "evaluation", "profiling", *PROGRAMS},
    "models": {"config", "data", "methods", "engine", "evaluation", "profiling", *PROGRAMS},
    "methods": {"config", "data", "engine", "evaluation", "profiling", *PROGRAMS},
    "engine": {"evaluation", "profiling", *PROGRAMS},
    "evaluation": {"profiling", *PROGRAMS},
    "profiling": PROGRAMS,
}
"""By the first word of a module's name: `config` is config_text and config_conflicts, too."""


def imported(path: Path) -> set[str]:
    """Full names of the modules a file imports, wherever in it."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("room", FORBIDDEN)
def test_a_room_imports_only_what_is_below_it(room: str) -> None:
    files = list((PACKAGE / room).glob("*.py"))
    assert files
    for path in files:
        rooms = {name.split(".")[1] for name in imported(path) if name.startswith("synco_fast.")}
        assert not {name for name in rooms if name.split("_")[0] in FORBIDDEN[room]}, path


def test_ops_needs_torch_and_nothing_else_to_install() -> None:
    for path in (PACKAGE / "ops").glob("*.py"):
        outside = {name.split(".")[0] for name in imported(path)} - {"synco_fast", "torch", "triton"}
        assert outside <= sys.stdlib_module_names, path
