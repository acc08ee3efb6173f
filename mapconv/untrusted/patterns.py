"""Regular expressions that a file brings, with PEFT's meaning and in bounded time.

PEFT hands the keys of ``rank_pattern`` and ``alpha_pattern``, and ``target_modules`` where it is one text, to Python's
``re``, which backtracks: ``(a+)+b`` takes 2**n steps on a name of n characters, and no option of ``re`` limits it.
A translation to an engine without backtracking would change what some expressions mean. So an expression keeps ``re``
and its meaning, and before it meets a name, the steps that backtracking may take on that name are counted: by how many
ways each position can be reached, in a table, which takes no longer than the steps that it counts. Ways to match a
sane expression are few; one that could take more than ``MOST_STEPS`` is refused by name.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, Generic, TypeVar

from mapconv.errors import AdapterError

if sys.version_info >= (3, 11):
    from re import _constants as ops
    from re import _parser as parser
else:
    import sre_constants as ops
    import sre_parse as parser

Value = TypeVar("Value")

#: About 20 ms of ``re``. Expressions of published adapters take a few hundred steps on a module's path.
MOST_STEPS = 1_000_000
#: Keys of one table that are not plain names: each is tried on each module.
MOST_EXPRESSIONS = 1_000
#: An expression with no more ways to match any text than these needs no count.
_FEW = 20_000
#: A path, as it is or through ``re.escape``.
_PLAIN = re.compile(r"(?:[\w./-]|\\[.-])+")
_SINGLE = {ops.LITERAL, ops.NOT_LITERAL, ops.ANY, ops.IN}
_REPEATS = {ops.MAX_REPEAT, ops.MIN_REPEAT, getattr(ops, "POSSESSIVE_REPEAT", None)}

_INVALID = (re.error, RecursionError, OverflowError, ValueError)
_CATEGORIES: dict[str, Callable[[str], bool]] = {
    "DIGIT": str.isdecimal,
    "SPACE": str.isspace,
    "WORD": lambda character: character.isalnum() or character == "_",
}


def require_bounded(expression: str, text: str, place: str) -> None:
    """Refuse an expression on which ``re`` may backtrack for long before it knows whether ``text`` matches.

    Raises:
        AdapterError: more than MOST_STEPS steps, or no regular expression; ``place`` says of which file and field.
    """
    try:
        tree = _parsed(expression)
        if _most_ways(tree, len(text)) > _FEW:
            _Steps(text).through(tree, {0: 1})
    except _TooManyError:
        raise AdapterError(
            f"{place} has {_short(expression)}, which may take {MOST_STEPS:,} steps and more to match against "
            f"{_short(text)}: write it without repetition inside repetition."
        ) from None
    except _INVALID as error:
        raise AdapterError(f"{place} has {_short(expression)}, which is not a regular expression ({error}).") from None


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:79]}…")


class PatternTable(Generic[Value]):
    r"""``rank_pattern`` or ``alpha_pattern``: the value of the first key that matches the end of a module's path.

    PEFT's ``get_pattern_key`` matches ``(.*\.)?(KEY)$``. Most keys are paths, of which a large adapter has thousands;
    they are looked up by their length and the places of their dots, each of which stands for any character.
    """

    def __init__(self, entries: Mapping[str, Value], place: str) -> None:
        """Raises AdapterError for a key that is not a regular expression; ``place`` is the file and the field."""
        self._place = place
        self._values = list(entries.values())
        self._keys = list(entries)
        self._names: dict[int, dict[tuple[int, ...], dict[str, int]]] = {}
        self._expressions: list[tuple[int, str, re.Pattern[str]]] = []
        for order, key in enumerate(entries):
            if _PLAIN.fullmatch(key):
                name, dots = _name(key)
                self._names.setdefault(len(name), {}).setdefault(dots, {}).setdefault(name, order)
            else:
                try:
                    self._expressions.append((order, key, re.compile(_at_the_end(key))))
                except _INVALID as error:
                    raise AdapterError(
                        f"{place} has {_short(key)}, which is not a regular expression ({error})."
                    ) from None
        if len(self._expressions) > MOST_EXPRESSIONS:
            raise AdapterError(
                f"{place} has {len(self._expressions):,} regular expressions, expected at most {MOST_EXPRESSIONS:,}: "
                "name the modules by their paths."
            )

    def items(self) -> Iterable[tuple[str, Value]]:
        return zip(self._keys, self._values, strict=True)

    def get(self, path: str, default: Value) -> Value:
        """Raises AdapterError where a key may take too long."""
        first = self._first_name(path)
        for order, key, pattern in self._expressions:
            if order > first:
                break
            require_bounded(_at_the_end(key), path, self._place)
            if pattern.match(path):
                first = order
                break
        return self._values[first] if first < len(self._values) else default

    def _first_name(self, path: str) -> int:
        if "\n" in path:  # where neither "." nor "$" mean what they do elsewhere
            found = (order for order, key in enumerate(self._keys) if re.match(_at_the_end(key), path))
            return next(found, len(self._keys))
        first = len(self._keys)
        for length, shapes in self._names.items():
            start = len(path) - length
            if start < 0 or (start > 0 and path[start - 1] != "."):
                continue
            end = path[start:]
            for dots, names in shapes.items():
                first = min(first, names.get(_with_dots(end, dots), first))
        return first


def _name(key: str) -> tuple[str, tuple[int, ...]]:
    """The text that a key stands for, and the places of its dots without a backslash, which match any character."""
    parts = re.findall(r"\\?.", key)
    return "".join(part[-1] for part in parts), tuple(place for place, part in enumerate(parts) if part == ".")


def _with_dots(text: str, places: tuple[int, ...]) -> str:
    if all(text[place] == "." for place in places):
        return text
    characters = list(text)
    for place in places:
        characters[place] = "."
    return "".join(characters)


def _at_the_end(key: str) -> str:
    return rf"(.*\.)?({key})$"


@cache
def _parsed(expression: str) -> Any:
    return parser.parse(expression)


def _most_ways(tree: Any, length: int) -> float:
    """No fewer than the ways to match any text of this length; infinite for repetition inside repetition."""
    ways: float = 1
    for op, argument in tree:
        if op in _REPEATS:
            least, most, body = argument
            inner = _most_ways(body, length)
            if most > 1 and inner > 1:
                return math.inf
            ways *= inner + 1 if (least, most) == (0, 1) else 1 if least == most else length + 1
        elif op is ops.BRANCH:
            ways *= sum(_most_ways(alternative, length) for alternative in argument[1])
        elif op is ops.SUBPATTERN:
            ways *= _most_ways(argument[-1], length)
        elif op not in _SINGLE and op is not ops.AT:
            return math.inf
    return ways


class _TooManyError(Exception):
    pass


class _Steps:
    """Counts the steps of a backtracking search on one text; what it cannot tell, it takes for the most.

    ``ways`` has, for each position, in how many ways the search gets there.
    """

    def __init__(self, text: str) -> None:
        self._text, self._steps = text, 0

    def through(self, tree: Any, ways: dict[int, int]) -> dict[int, int]:
        """The positions after all of a tree's parts."""
        for op, argument in tree:
            self._steps += sum(ways.values())
            if self._steps > MOST_STEPS:
                raise _TooManyError
            if not ways:
                break
            ways = self._after(op, argument, ways)
        return ways

    def _after(self, op: Any, argument: Any, ways: dict[int, int]) -> dict[int, int]:
        if op in _SINGLE:
            text = self._text
            return {p + 1: n for p, n in ways.items() if p < len(text) and _may_match(op, argument, text[p])}
        if op in _REPEATS:
            least, most, body = argument
            return self._repeated(least, most, body, ways)
        if op is ops.BRANCH:
            return _sum([self.through(alternative, ways) for alternative in argument[1]])
        if op is ops.SUBPATTERN:
            return self.through(argument[-1], ways)
        if op is getattr(ops, "ATOMIC_GROUP", None):
            return self.through(argument, ways)
        if op in (ops.ASSERT, ops.ASSERT_NOT):  # looks, and stays where it is
            if argument[0] > 0:  # a look behind has a fixed width, and with it few ways
                self.through(argument[1], ways)
            return ways
        if op is ops.GROUPREF_EXISTS:
            return _sum([self.through(part, ways) if part else ways for part in argument[1:]])
        if op is ops.GROUPREF:  # as long as what its group had matched: any length
            return _sum([{q: n} for p, n in ways.items() for q in range(p, len(self._text) + 1)])
        return ways  # anchors

    def _repeated(self, least: int, most: int, body: Any, ways: dict[int, int]) -> dict[int, int]:
        found: list[dict[int, int]] = []
        count = 0
        while ways:
            if count >= least:
                found.append(ways)
            if count == most:
                break
            if len(self._text) < count < least:  # rounds that match nothing, again and again
                raise _TooManyError
            # Once the least is reached, a round that matches nothing ends the repetition.
            rounds = [(p, self.through(body, {p: n})) for p, n in ways.items()]
            ways = _sum([{q: n for q, n in after.items() if q > p or count < least} for p, after in rounds])
            count += 1
        return _sum(found)


def _sum(tables: Iterable[dict[int, int]]) -> dict[int, int]:
    total: dict[int, int] = {}
    for table in tables:
        for position, ways in table.items():
            total[position] = total.get(position, 0) + ways
    return total


def _may_match(op: Any, argument: Any, character: str) -> bool:
    """Whether one character matches; in either case, whatever the flags, and any that a category may hold."""
    if op is ops.ANY:
        return True
    codes = {ord(c) for c in (character, *character.lower(), *character.upper())}
    if op is ops.LITERAL:
        return argument in codes
    if op is ops.NOT_LITERAL:
        return codes != {argument}
    negated = argument[0][0] is ops.NEGATE
    inside = [_in_part(part, value, codes, character) for part, value in argument[negated:]]
    return not any(inside) or len(codes) > 1 if negated else any(inside)


def _in_part(op: Any, value: Any, codes: set[int], character: str) -> bool:
    if op is ops.LITERAL:
        return value in codes
    if op is ops.RANGE:
        return any(value[0] <= code <= value[1] for code in codes)
    name = str(value)
    holds = _CATEGORIES[name.rpartition("_")[2]](character)
    return holds != ("_NOT_" in name)
