"""Keys of ``rank_pattern``: the value that PEFT finds, and a refusal where ``re`` would not come back."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from mapconv.errors import AdapterError
from mapconv.untrusted.patterns import PatternTable, require_bounded
from tests import examples

PATH = "model.layers.17.self_attn.q_proj"
parts = st.sampled_from(["a", "b", ".", "q_proj", "1", "-", "layers", r"\.", r"\-", "/"])
expressions = st.sampled_from(["a.*", "(a|b)", "[ab]", "a+", "^a", "q_proj|b", r"\d+", "(?:a.)*b", "a$", ""])
keys = st.lists(parts, max_size=4).map("".join) | expressions
paths = st.lists(st.sampled_from(["a", "b", ".", "q_proj", "1", "-", "layers", "\n"]), max_size=6).map("".join)


@settings(max_examples=examples(500))
@given(st.lists(keys, unique=True, max_size=5), paths)
def test_the_first_key_that_peft_finds(keys, path):
    found = PatternTable({key: key for key in keys}, "x").get(path, "none")
    # PEFT gives the path itself where no key matches.
    theirs = get_pattern_key(keys, path)
    assert found == (theirs if theirs in keys and re.match(rf"(.*\.)?({theirs})$", path) else "none")


@pytest.mark.parametrize(
    "expression",
    [
        r".*\.(q|v)_proj", r"(?:layers\.\d+\.)+self_attn\.q_proj", r"(\w+\.)*q_proj", r".*layers.*self.*(up|q)_proj.*",
        r"^(?!.*visual).*(?:q_proj|k_proj|v_proj)$", r"(?:(?:model|layers|\d+|self_attn)\.)*q_proj", r"(.*)\1",
        r"model\.layers\.(?:[0-9]|1[0-9]|2[0-3])\..*proj", r"(?<=x)?.*q_proj",
    ],
)  # fmt: skip
def test_sane_expressions_are_not_refused(expression):
    require_bounded(expression, PATH, "x")


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        (r"(a+)+b", "a" * 40), (r"(a|a)*b", "a" * 40), (r"(.*)*x", PATH), (r".*.*.*.*.*.*.*x", PATH),
        (r"(a?){1000000}x", PATH), ("a?" * 40 + "a" * 40, "a" * 40), (r"(?=(a+)+b)", "a" * 40),
        (r"((a*)*)*b", "a" * 40), (r"(\w+\d*)+!", "a" * 40), (r"(?i)(A+)+B", "a" * 40),
    ],
)  # fmt: skip
def test_an_expression_that_takes_for_ever_is_refused_at_once(expression, text):
    with pytest.raises(AdapterError, match=r"config\.json: rank_pattern has .*repetition inside repetition"):
        require_bounded(expression, text, "config.json: rank_pattern")


def test_thousands_of_paths_are_looked_up_at_once():
    paths = [f"model.layers.{layer}.mlp.experts.{expert}.up_proj" for layer in range(60) for expert in range(100)]
    table = PatternTable({path: number for number, path in enumerate(paths)}, "x")
    assert [table.get(path, -1) for path in paths] == list(range(6000))


def test_too_many_expressions():
    with pytest.raises(AdapterError, match="1,001 regular expressions"):
        PatternTable({f"a{number}.*": 1 for number in range(1001)}, "x")
