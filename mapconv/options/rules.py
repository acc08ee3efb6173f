"""Rules between options: one sentence each for the command line, the functions and the catalog file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

#: An option by its name, or one value of it: ``"rank"``, ``("direction", "dora")``.
Term = str | tuple[str, Any]
#: How an option is written where the sentence is read: (name, value or ``...``) → ``--direction dora``.
Spell = Callable[[str, Any], str]


class Rule(Protocol):
    """``names`` are the options that it is about, the one to blame first."""

    @property
    def names(self) -> tuple[str, ...]: ...

    def fault(self, given: Mapping[str, Any], spell: Spell, /) -> str | None:
        """What is wrong with the options that were given (those that differ from their defaults), or None."""


@dataclass(frozen=True)
class Requires:
    """``option`` means nothing without ``other``, and would be ignored."""

    option: Term
    other: Term

    @property
    def names(self) -> tuple[str, ...]:
        return _name(self.option), _name(self.other)

    def fault(self, given: Mapping[str, Any], spell: Spell) -> str | None:
        if _holds(self.option, given) and not _holds(self.other, given):
            return f"{_spelled(self.option, spell)} requires {_spelled(self.other, spell)}"
        return None


@dataclass(frozen=True)
class Excludes:
    """Two options of which one would be ignored; ``why`` says which, where that is no matter of course."""

    option: Term
    other: Term
    why: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        return _name(self.option), _name(self.other)

    def fault(self, given: Mapping[str, Any], spell: Spell) -> str | None:
        if _holds(self.option, given) and _holds(self.other, given):
            reason = f": {self.why}" if self.why else ""
            return f"{_spelled(self.option, spell)} and {_spelled(self.other, spell)} cannot be used together{reason}"
        return None


@dataclass(frozen=True)
class Check:
    """Any other rule: a function of the options given and of how they are spelled."""

    names: tuple[str, ...]
    fault: Callable[[Mapping[str, Any], Spell], str | None]


def _name(term: Term) -> str:
    return term if isinstance(term, str) else term[0]


def _holds(term: Term, given: Mapping[str, Any]) -> bool:
    return term in given if isinstance(term, str) else given.get(term[0], ...) == term[1]


def _spelled(term: Term, spell: Spell) -> str:
    return spell(term, ...) if isinstance(term, str) else spell(*term)
