"""Where a checkpoint's names lead in the live model; of thousands that differ in numbers alone, from a few of them.

transformers' tables rename by regular expressions that take the number of a layer or an expert as it comes, and a model
has tens of thousands of experts: names of one form follow the rule that the first of them show.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, replace

_NUMBER = re.compile(r"(?<![^.])[0-9]+(?![^.])")
#: What stands for any number in a pattern; a digit elsewhere, but for one in a word (``w1``), means that number alone.
_ANY_NUMBER = re.compile(r"\\d|\[0-9\]|\{[0-9,]+\}")
_OWN_NUMBER = re.compile(r"(?<![A-Za-z_0-9])[0-9]")


@dataclass(frozen=True)
class Region:
    """Where a name's values lie in the live model: a parameter, one of its stacked matrices, a part of its rows.

    ``plain`` is false where they are also rearranged (permuted, split, transposed) on the way there.
    """

    parameter: str
    index: int | None = None
    part: int = 0
    parts: int = 1
    plain: bool = True


class NumberedNames:
    """``convert`` for many names: it is asked for a few of each form, and whenever there is a doubt.

    Args:
        convert: where one name leads.
        patterns: the regular expressions that it goes by; if one speaks of a certain number, every name is asked for.
        known: the live model's parameters; a rule that leads elsewhere is not followed.
    """

    def __init__(self, convert: Callable[[str], Region], patterns: Iterable[str], known: Container[str]) -> None:
        self._convert, self._known = convert, known
        self._regular = not any(_OWN_NUMBER.search(_ANY_NUMBER.sub("", pattern)) for pattern in patterns)
        self._rules: dict[str, _Rule] = {}

    def locate(self, name: str) -> Region:
        numbers = _NUMBER.findall(name) if self._regular else []
        if not numbers:
            return self._convert(name)
        rule = self._rules.get(form := _form(name))
        if rule is not None and rule.certain:
            region = rule.region_of(numbers)
            if region.parameter in self._known:
                return region
        region = self._convert(name)
        if rule is None:
            self._rules[form] = _Rule(numbers, region)
        else:
            rule.learn(numbers, region)
        return region


class _Rule:
    """Which number of a name becomes which of its parameter's, and last the index; by elimination."""

    def __init__(self, numbers: list[str], region: Region) -> None:
        self._numbers, self._region = numbers, region
        self._form, values = _target(region)
        #: For each number of the target those of the name that it may be.
        self._sources = [{i for i, number in enumerate(numbers) if number == value} for value in values]
        #: Numbers that were always the same, and so may be constants of the target as well.
        self._fixed = set(range(len(numbers)))
        self.certain = False

    def learn(self, numbers: list[str], region: Region) -> None:
        form, values = _target(region)
        if form != self._form or _without_numbers(region) != _without_numbers(self._region):
            self._sources = [set()]  # these names follow no rule
        for sources, value in zip(self._sources, values, strict=False):
            sources.intersection_update([i for i, number in enumerate(numbers) if number == value])
        self._fixed = {i for i in self._fixed if numbers[i] == self._numbers[i]}
        self.certain = not self._fixed and all(len(sources) == 1 for sources in self._sources)

    def region_of(self, numbers: list[str]) -> Region:
        found = [numbers[next(iter(sources))] for sources in self._sources]
        index = None if self._region.index is None else int(found.pop())
        return replace(self._region, parameter=self._form.format(*found), index=index)


def _form(name: str) -> str:
    return _NUMBER.sub("{}", name.replace("{", "{{").replace("}", "}}"))


def _target(region: Region) -> tuple[str, list[str]]:
    """The form of the region's parameter, and all numbers of the region."""
    index = [] if region.index is None else [str(region.index)]
    return _form(region.parameter), _NUMBER.findall(region.parameter) + index


def _without_numbers(region: Region) -> Region:
    return replace(region, parameter="", index=None if region.index is None else 0)
