"""What setuptools builds; everything that can be said statically is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["synco_fast", "synco_fast.*"]), "synco_fast.configs"],
    package_dir={"synco_fast.configs": "configs"},
    package_data={"synco_fast.configs": ["*.yaml"]},
)
