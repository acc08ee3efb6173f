"""An option and a command as records, of which the command line, the functions and the catalog file are views."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ParamSpec, TypeVar

from mapconv.options.kinds import Flag, Kind
from mapconv.options.rules import Rule, Spell

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Option:
    """One option, or with ``positional`` an argument.

    Args:
        name: as the functions and the catalog spell it.
        kind: what it may hold; None stands for the default as well, where that is None.
        help: for the command line.
        default: what the function takes; an option is *given* where its value differs.
        fallback: what stands in for a default of None, as help says it.
        spelling: on the command line, where that is not the name.
        short: ``-o``.
        metavar: of the value in help.
        required: it has no default.
        positional: an argument, not an option; ``many`` takes several.
        in_python, in_catalog: whether the function and the catalog file know it; the command line knows all.
        refusal: why a catalog does not, where that needs saying.
    """

    name: str
    kind: Kind
    help: str = ""
    default: Any = None
    fallback: Any = None
    spelling: str | None = None
    short: str | None = None
    metavar: str | None = None
    required: bool = False
    positional: bool = False
    many: bool = False
    in_python: bool = True
    in_catalog: bool = True
    refusal: str = "the run sets it"

    @property
    def flag(self) -> str:
        """``--max-rank``."""
        return self.spelling or f"--{self.name.replace('_', '-')}"

    def but(self, **changes: Any) -> Option:
        """The same option, as a command has it that differs in something."""
        return replace(self, **changes)

    def is_given(self, value: Any) -> bool:
        """Whether the value asks for something: a default that is spelled out does not."""
        if isinstance(self.kind, Flag):
            return value is True
        return self.required or (value is not None and value != self.default)

    def read(self, value: Any) -> Any:
        """The value as the function takes it.

        Raises:
            ValueError: with what was expected.
        """
        if value is None and not self.required and self.default is None:
            return None
        if self.many and not isinstance(value, str) and isinstance(value, Iterable):
            return [self.kind.read(item) for item in value]
        return self.kind.read(value)


@dataclass(frozen=True)
class Group:
    """Options that come together, and the rules between them."""

    options: tuple[Option, ...]
    rules: tuple[Rule, ...] = ()

    def __iter__(self) -> Iterator[Option]:
        return iter(self.options)


class Command:
    """The options of one command in the order of its help page, and the rules between them."""

    def __init__(self, name: str, *parts: Option | Group, rules: tuple[Rule, ...] = ()) -> None:
        self.name = name
        options = [option for part in parts for option in ((part,) if isinstance(part, Option) else part)]
        self.options: Mapping[str, Option] = {option.name: option for option in options}
        if len(self.options) < len(options):
            raise ValueError(f"{name} has an option twice")
        self.rules = (*(rule for part in parts if isinstance(part, Group) for rule in part.rules), *rules)
        unknown = {option for rule in self.rules for option in rule.names} - self.options.keys()
        if unknown:
            raise ValueError(f"{name} has rules about options that it does not have: {unknown}")

    def faults(
        self, values: Mapping[str, Any], spell: Spell, *, unread: Collection[str] = ()
    ) -> Iterator[tuple[str, str]]:
        """(option to blame, what is wrong) for each rule that these values break.

        Of options ``unread``, whose values were refused already, no rule speaks.
        """
        given = {name: value for name, value in values.items() if self.options[name].is_given(value)}
        for rule in self.rules:
            if not set(unread).isdisjoint(rule.names):
                continue
            fault = rule.fault(given, spell)
            if fault is not None:
                yield next((name for name in rule.names if name in given), rule.names[0]), fault

    def checks(self, function: Callable[P, R]) -> Callable[P, R]:
        """Decorate the command's function: values of another kind and broken rules raise ValueError first."""
        signature = inspect.signature(function)

        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            bound = [signature.bind(*args, **kwargs)]
            self._read(bound[0].arguments)
            # A traceback that prints local variables must not find a token here.
            del args, kwargs
            return function(*bound[0].args, **bound.pop().kwargs)

        return checked

    def _read(self, arguments: dict[str, Any]) -> None:
        """Put what each option makes of its value in the value's place."""
        for name, value in arguments.items():
            try:
                arguments[name] = self.options[name].read(value)
            except ValueError as error:
                raise ValueError(f"{name} is {value!r}, expected {error}") from None
        for _, fault in self.faults(arguments, _in_python):
            raise ValueError(fault)

    def spelled(self, name: str, value: Any = ...) -> str:
        """An option as it is typed: ``--direction dora``."""
        option = self.options[name]
        word = (option.metavar or name.upper()) if option.positional else option.flag
        return word if value is ... or isinstance(option.kind, Flag) else f"{word} {value}"


def _in_python(name: str, value: Any) -> str:
    return name if value is ... else f"{name}={value!r}"
