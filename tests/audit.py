"""Refuse dependencies that constraints.txt does not pin by version and hash: a part of `make lint`, run in .venv."""

import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from importlib.metadata import Distribution, distributions
from itertools import chain
from pathlib import Path

from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.requirements import required

PIN = re.compile(r"([\w.-]+)==([\w.!+]+)(?: ; (.+?))?(?: --hash=sha256:[0-9a-f]{64})+")
"""A line of constraints.txt with its continuations: name, version and marker."""


def audit(root: Path, installed: Iterable[Distribution]) -> list[str]:
    """What is wrong with the pins of the project in `root` and with what is installed, by the culprits' names."""
    wrong = []
    pinned = defaultdict(set)  # by name, for any Python and machine
    here = {}  # by name, for this one
    for line in (root / "constraints.txt").read_text(encoding="utf-8").replace("\\\n", "").splitlines():
        line = " ".join(line.split())
        if not line or line.startswith("#"):
            continue
        pin = PIN.fullmatch(line)
        if pin is None:
            wrong.append(f"constraints.txt: {line[:80]}: not NAME==VERSION with sha256 hashes")
            continue
        name, version, marker = canonicalize_name(pin[1]), Version(pin[2]), pin[3]
        pinned[name].add(version)
        if marker is None or Marker(marker).evaluate():
            here[name] = version

    for text in chain(*required(root / "pyproject.toml").values()):
        requirement = Requirement(text)
        versions = sorted(pinned[canonicalize_name(requirement.name)])
        if not versions or not all(requirement.specifier.contains(version, prereleases=True) for version in versions):
            wrong.append(f"pyproject.toml: {text}: constraints.txt pins {', '.join(map(str, versions)) or 'none'}")

    for distribution in installed:
        name, version = canonicalize_name(distribution.metadata["Name"]), Version(distribution.version)
        if name != "synco-fast" and here.get(name) != version:
            wrong.append(f"installed: {name} {version}: constraints.txt pins {here.get(name, 'none')}")
    return wrong


if __name__ == "__main__":
    sys.exit("\n".join(audit(Path(), distributions())) or None)
