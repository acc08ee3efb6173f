"""What an option may hold: how a value is told from a mistake, wherever it comes from."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?b)?", re.IGNORECASE)


class Kind(Protocol):
    """A kind of value. ``expected`` ends the sentence of an error: "rank is 0, expected …"."""

    @property
    def expected(self) -> str: ...

    def read(self, value: Any) -> Any:
        """The value as the functions take it.

        Raises:
            ValueError: it is of another kind; the message is what was expected.
        """


@dataclass(frozen=True)
class Flag:
    """True or false. On the command line a flag is off unless it is typed, whatever the function's default."""

    expected = "true or false"

    def read(self, value: Any) -> bool:
        return _if(type(value) is bool, value, self)


@dataclass(frozen=True)
class Text:
    expected = "a text"

    def read(self, value: Any) -> str:
        return _if(isinstance(value, str), value, self)


@dataclass(frozen=True)
class Folder:
    """A folder on this machine, which may be yet to come."""

    expected = "a path"

    def read(self, value: Any) -> Any:
        return _if(_is_path(value), value, self)


@dataclass(frozen=True)
class File:
    """A file on this machine; ``exists`` where it is read, so that a catalog can tell before its run."""

    exists: bool = False
    expected = "a path"

    def read(self, value: Any) -> Any:
        return _if(_is_path(value), value, self)


@dataclass(frozen=True)
class Source:
    """A folder or a Hub reference, as it was typed: a Path would forget the ``./`` that tells the two apart."""

    expected = "a folder or a Hub id"

    def read(self, value: Any) -> Any:
        return _if(_is_path(value), value, self)


@dataclass(frozen=True)
class Repository:
    """The name of a repository on the Hub, with its owner."""

    expected = "a name such as owner/name"

    def read(self, value: Any) -> str:
        return _if(isinstance(value, str), value, self)


@dataclass(frozen=True)
class Whole:
    """A whole number of at least ``least``."""

    least: int = 1

    @property
    def expected(self) -> str:
        return f"a whole number of at least {self.least}"

    def read(self, value: Any) -> int:
        # bool is an int to isinstance, and `rank: true` must not pass for 1.
        return _if(type(value) is int and value >= self.least, value, self)


@dataclass(frozen=True)
class Real:
    """A finite number; ``above`` and ``below`` are excluded, ``least`` is not."""

    above: float | None = None
    below: float | None = None
    least: float | None = None

    @property
    def expected(self) -> str:
        if self.above is not None and self.below is not None:
            return f"a number between {self.above:g} and {self.below:g}"
        low = "" if self.above is None else f" above {self.above:g}"
        return f"a number{low}{'' if self.least is None else f' of at least {self.least:g}'}"

    def read(self, value: Any) -> float:
        fits = type(value) in (int, float) and math.isfinite(value)
        fits = fits and (self.above is None or value > self.above) and (self.below is None or value < self.below)
        return _if(fits and (self.least is None or value >= self.least), value, self)


@dataclass(frozen=True)
class Share:
    """A share of a whole: above 0, and up to 1."""

    expected = "a number above 0, up to 1"

    def read(self, value: Any) -> float:
        return _if(type(value) in (int, float) and 0 < value <= 1, value, self)


@dataclass(frozen=True)
class CountOrShare:
    """A whole number from 1 on, or a share of the whole between 0 and 1."""

    expected = "a whole number, or a share between 0 and 1"

    def read(self, value: Any) -> float:
        fits = (type(value) is int and value >= 1) or (type(value) is float and 0 < value < 1)
        return _if(fits, value, self)


@dataclass(frozen=True)
class Choice:
    """One of some words; ``pattern`` matches further ones that need no place in a list."""

    choices: tuple[str, ...]
    pattern: str | None = None

    @property
    def expected(self) -> str:
        return f"{', '.join(self.choices[:-1])} or {self.choices[-1]}"

    def read(self, value: Any) -> str:
        fits = isinstance(value, str) and (
            value in self.choices or (self.pattern is not None and re.fullmatch(self.pattern, value) is not None)
        )
        return _if(fits, value, self)


@dataclass(frozen=True)
class Size:
    """Bytes: a number, or a text such as ``5GB``. ``word``, where there is one, stands for None.

    A number without a unit that is below ``least`` was meant in another unit.
    """

    least: int
    word: str | None = None

    @property
    def expected(self) -> str:
        return f"{f'{self.word!r} or ' if self.word else ''}a size such as 5GB"

    def read(self, value: Any) -> int | None:
        if isinstance(value, str) and value == self.word:
            return None
        match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
        if match is not None:
            number = int(float(match[1]) * _UNITS[(match[2] or "").upper()])
        elif type(value) is int:
            number = value
        else:
            raise ValueError(self.expected)
        if number < 1:
            raise ValueError(self.expected)
        if number < self.least and not (match and match[2]):
            raise ValueError(f"a size with its unit, such as {number}GB: {number} alone would be bytes")
        return number


@dataclass(frozen=True)
class Reals:
    """Several finite numbers: a list, or a text with commas between them."""

    expected = "numbers with commas between them, such as 0.7,0.3"

    def read(self, value: Any) -> tuple[float, ...]:
        if isinstance(value, str):
            try:
                value = [float(part) for part in value.split(",")]
            except ValueError:
                raise ValueError(self.expected) from None
        fits = isinstance(value, Sequence) and len(value) > 0
        fits = fits and all(type(number) in (int, float) and math.isfinite(number) for number in value)
        return _if(fits, tuple(value) if fits else (), self)


@dataclass(frozen=True)
class Names:
    """Names of modules: a list, or a text with commas between them, which may be a regular expression instead."""

    expected = "names with commas between them, or a regular expression"

    def read(self, value: Any) -> str | tuple[str, ...]:
        if isinstance(value, str):
            return _if(bool(value.strip(" ,")), value, self)
        fits = isinstance(value, Sequence) and len(value) > 0 and all(isinstance(name, str) for name in value)
        return _if(fits, tuple(value) if fits else (), self)


def _if(fits: bool, value: Any, kind: Kind) -> Any:
    if not fits:
        raise ValueError(kind.expected)
    return value


def _is_path(value: Any) -> bool:
    return isinstance(value, str | os.PathLike) and "\0" not in os.fspath(value)
