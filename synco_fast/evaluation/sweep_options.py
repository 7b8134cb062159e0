"""The evaluations of a sweep: commands of the command line, which judges their options before anything starts."""

import difflib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import typer

from synco_fast.errors import UserError

NOT_TO_SET = ("data", "output", "resume")
"""Options that a sweep gives itself."""

_PLACES = ("CHECKPOINT", "--data", "DATA", "--output", "OUTPUT")  # to be parsed only


@dataclass(frozen=True)
class Evaluation:
    """A command that a sweep may run on a checkpoint.

    Attributes:
        command: of the command line. check: raises UserError where its options, each good alone, do not go together.
    """

    command: Any  # typer's; which package its class is from depends on typer's version
    check: Callable[[typer.Context], object]

    @property
    def parameters(self) -> dict[str, Any]:
        """Those that are options, by name without dashes."""
        return {
            option[2:]: parameter
            for parameter in self.command.params
            for option in parameter.opts
            if option.startswith("--")
        }

    def words(self, options: Mapping[str, Any]) -> list[str]:
        """What the command is told beside the places: the options, and to go on where it was stopped, if it can."""
        trains = "resume" in self.parameters and "cached" not in options  # what is cached is not trained by steps
        return [*self._words(options), *(["--resume", "auto"] if trains else [])]

    def _words(self, options: Mapping[str, Any]) -> list[str]:
        """Options as words of the command line: lists are repeated where the option is, else joined by commas."""
        found, parameters = [], self.parameters
        for name, value in options.items():
            if value is True:
                found.append(f"--{name}")
                continue
            values = value if isinstance(value, list) else [value]
            if not parameters[name].multiple:
                values = [",".join(map(as_text, values))]
            found += [word for part in values for word in (f"--{name}", as_text(part))]
        return found

    def problems(self, options: Mapping[str, Any]) -> list[str]:
        """What is wrong with options of a sweep's file: line by line, below the option where it is one's."""
        found = [problem for name, value in options.items() for problem in self._problems_of(name, value)]
        if found:
            return found
        try:
            self.check(self._parsed(options))
        except UserError as error:
            return [f": {error}"]
        except typer.BadParameter as error:
            return [f": {error.format_message()}"]
        return []

    def _problems_of(self, name: str, value: Any) -> Iterator[str]:
        """What is wrong with an option by itself."""
        known = {name: parameter for name, parameter in self.parameters.items() if name not in NOT_TO_SET}
        where = f".{name}"
        if name not in known:
            yield f"{where}: {self.command.name} has no option --{name} for a sweep to set{nearest(name, known)}"
        elif getattr(known[name], "is_flag", False):
            if value is not True:
                yield f"{where} = {value!r}: --{name} takes no value; write true, or leave it out"
        elif not _is_value(value):
            yield f"{where} = {value!r}: expected a number, a text, or a list of them"
        else:
            try:
                self._parsed({name: value})
            except UserError as error:
                yield f"{where}: {error}"
            except typer.BadParameter as error:
                if error.param is known[name]:  # another one is missing, in these words alone
                    yield f"{where} = {value!r}: {error.message}"

    def _parsed(self, options: Mapping[str, Any]) -> typer.Context:
        """The command line's own reading of the options; it raises what the command would."""
        return self.command.make_context(self.command.name, [*_PLACES, *self._words(options)])


def as_text(value: Any) -> str:
    """A value as a person writes it."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def nearest(name: str, known: Mapping[str, Any]) -> str:
    """The end of a message about a name that is not known."""
    found = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {found[0]}?" if found else f"; there are {', '.join(known)}"


def _is_value(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and not any(isinstance(part, list) or not _is_value(part) for part in value)
    return isinstance(value, str) or (type(value) in (int, float) and math.isfinite(value))
