"""Names of one form follow the rule that the first of them show, and nothing else is guessed."""

from __future__ import annotations

import re

import pytest

from mapconv.placement.numbering import NumberedNames, Region

EXPERTS = [f"m.layers.{layer}.experts.{expert}.w1.weight" for layer in range(5) for expert in range(7)]


def fused(name: str) -> Region:
    layer, expert = re.findall(r"\.(\d+)\.", name)
    return Region(f"model.layers.{layer}.experts.up", int(expert), 1, 2)


class Counted:
    def __init__(self, convert) -> None:
        self.convert, self.names = convert, []

    def __call__(self, name: str) -> Region:
        self.names.append(name)
        return self.convert(name)


def locate_all(convert, names, patterns=(r"layers\.(\d+)\.",), known=None):
    asked = Counted(convert)
    numbered = NumberedNames(asked, patterns, {convert(name).parameter for name in names} if known is None else known)
    assert [numbered.locate(name) for name in names] == [convert(name) for name in names]
    return asked.names


def test_most_names_follow_the_rule():
    assert len(locate_all(fused, EXPERTS)) < len(EXPERTS) / 3
    # Layer and expert that are equal in the first names do not confuse it.
    diagonal = [f"m.layers.{n}.experts.{n}.w1.weight" for n in range(5)]
    assert len(locate_all(fused, diagonal + EXPERTS)) < len(EXPERTS) / 2


def test_a_number_that_never_varied_may_be_a_constant():
    def convert(name: str) -> Region:
        layer, expert = re.findall(r"\.(\d+)\.", name)
        return Region("model.layers.0.experts.up" if layer == "0" else f"other.{layer}.experts.up", int(expert))

    assert len(locate_all(convert, EXPERTS)) == len(EXPERTS)


def test_names_that_follow_no_rule_are_all_asked_for():
    def reversed_layers(name: str) -> Region:
        region = fused(name)
        return Region(f"model.layers.{4 - int(region.parameter.split('.')[2])}.experts.up", region.index)

    assert len(locate_all(reversed_layers, EXPERTS)) == len(EXPERTS)


@pytest.mark.parametrize("pattern", [r"layers\.0\.", r"^0\.", r"layers\.[01]\.", r"layers\.(3|4)\."])
def test_a_pattern_of_a_certain_number_ends_all_guessing(pattern):
    assert len(locate_all(fused, EXPERTS, patterns=[pattern])) == len(EXPERTS)


@pytest.mark.parametrize("pattern", [r"experts.*.w1.weight", r"layers\.([0-9]+)\.fc2", r"h\.\d{1,3}\.conv1d"])
def test_a_digit_in_a_word_is_no_number(pattern):
    assert len(locate_all(fused, EXPERTS, patterns=[pattern])) < len(EXPERTS)


def test_a_rule_that_leads_to_no_parameter_is_not_followed():
    known = {f"model.layers.{layer}.experts.up" for layer in range(4)}
    asked = locate_all(fused, EXPERTS, known=known)
    assert set(EXPERTS[-7:]) <= set(asked)
