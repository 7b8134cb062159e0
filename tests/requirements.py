"""Print what pyproject.toml requires for the build, always, and with the extras named, for pip's `-r`.

Given the project itself, pip would refuse to check hashes: a folder has none.
"""

import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def required(pyproject: Path) -> dict[str, list[str]]:
    """Requirements by extra; those of the build and of the package without extras are under ""."""
    table = tomllib.loads(pyproject.read_text(encoding="utf-8"))
    project = table["project"]
    return {"": table["build-system"]["requires"] + project["dependencies"], **project["optional-dependencies"]}


if __name__ == "__main__":
    requirements = required(Path("pyproject.toml"))
    for extra in ("", *sys.argv[1:]):
        print(*requirements[extra], sep="\n")
