"""The audit (`make lint` runs it on the project) names what is not pinned by version and hash."""

import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest

from tests.audit import audit
from tests.conftest import REPOSITORY

HASH = f"--hash=sha256:{'0a' * 32}"
PYPROJECT = """
[build-system]
requires = ["builder>=2"]
[project]
dependencies = ["Needed>=1"]
[project.optional-dependencies]
extra = ["optional<3; sys_platform == 'linux'"]
"""
CONSTRAINTS = f"""# a comment
builder==2.0 {HASH}
needed==1.0 ; python_full_version < '3' \\
    {HASH} \\
    {HASH}
needed==1.1 ; python_full_version >= '3' \\
    {HASH}
optional==2.1 \\
    {HASH}
"""


@pytest.mark.parametrize(
    ("old", "new", "wrong"),
    [
        ("", "", []),
        (f"2.1 \\\n    {HASH}", "2.1", ["constraints.txt: optional==2.1: ", "pyproject.toml: optional<3; "]),
        (HASH, HASH[:-1], ["constraints.txt: builder==2.0 ", "pyproject.toml: builder>=2: "]),
        (HASH, "--hash=md5:" + "0a" * 16, ["constraints.txt: builder==2.0 ", "pyproject.toml: builder>=2: "]),
        ("builder==2.0", "builder>=2.0", ["constraints.txt: builder>=2.0 ", "pyproject.toml: builder>=2: "]),
        ("builder==", "another==", ["pyproject.toml: builder>=2: constraints.txt pins none"]),
        ("builder==2.0", "builder==1.9", ["pyproject.toml: builder>=2: constraints.txt pins 1.9"]),
        ("optional==2.1", "optional==3.0", ["pyproject.toml: optional<3; "]),
        ("needed==1.0", "needed==0.9", ["pyproject.toml: Needed>=1: constraints.txt pins 0.9, 1.1"]),
        ("needed==1.1", "needed==1.2", ["installed: needed 1.1: constraints.txt pins 1.2"]),
        (">= '3'", "< '3'", ["installed: needed 1.1: constraints.txt pins none"]),
    ],
    ids=[
        "none",
        "no hash",
        "half a hash",
        "MD5",
        "no pin",
        "build",
        "misfit",
        "extra",
        "one of two",
        "moved",
        "marker",
    ],
)
def test_what_is_wrong_is_named(old: str, new: str, wrong: list[str], tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(PYPROJECT)
    assert old in CONSTRAINTS
    (tmp_path / "constraints.txt").write_text(CONSTRAINTS.replace(old, new, 1))
    for name, version in (("Needed", "1.1"), ("synco_fast", "0.1")):
        (tmp_path / f"{name}-{version}.dist-info").mkdir()
        (tmp_path / f"{name}-{version}.dist-info/METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    found = audit(tmp_path, distributions(path=[str(tmp_path)]))
    assert len(found) == len(wrong), found
    assert all(message.startswith(start) for message, start in zip(found, wrong, strict=True)), found


def test_a_package_that_came_another_way(tmp_path: Path) -> None:
    (tmp_path / "stray-1.0.dist-info").mkdir()
    (tmp_path / "stray-1.0.dist-info/METADATA").write_text("Name: stray\nVersion: 1.0\n")
    command, path = [sys.executable, "-m", "tests.audit"], {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=REPOSITORY, env=path, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "installed: stray 1.0: constraints.txt pins none" in done.stderr
