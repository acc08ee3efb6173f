"""The parts of a README.md: what is ours, what is the user's, and what survives which edit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mapconv.errors import HubError
from mapconv.metadata.card import card_facts
from mapconv.metadata.readme import Readme, check_card, compose, merge_readmes, parse_readme

lines = st.text(st.characters(codec="utf-8", exclude_characters="\r\x85\u2028\u2029", exclude_categories=("Cc", "Cs")))
texts = lines.filter(lambda text: "mapconv:" not in text).map(lambda text: text.strip("\n"))


@given(before=texts, after=texts)
def test_what_is_composed_is_taken_apart_again(before, after):
    text = compose({"tags": ["map"]}, "# Block", Readme({}, before, after))
    parsed = parse_readme(text, "x")
    assert parsed.own == (before, after)
    assert parsed.metadata == {"tags": ["map"]}
    assert parsed.recorded == parsed.own_hash
    assert compose(parsed.metadata, "# Block", parsed) == text


def test_text_of_before_mapconv_is_the_users_own():
    parsed = parse_readme("---\nlicense: mit\n---\n# My model\n\nWords.\n", "x")
    assert parsed == Readme({"license": "mit"}, "", "# My model\n\nWords.")
    assert parse_readme("# No metadata\n", "x") == Readme({}, "", "# No metadata")
    assert parse_readme("", "x") == Readme()


def pushed(text: str, edited: str | None = None) -> Readme:
    """A README.md on the Hub as a push with own text ``text`` left it, and as somebody edited it since."""
    parsed = parse_readme(compose({}, "block", Readme({}, "", text)), "x")
    return parsed if edited is None else Readme({}, "", edited, parsed.recorded)


@pytest.mark.parametrize(
    ("local", "remote", "kept"),
    [
        ("", None, ""),
        ("mine", None, "mine"),
        ("", pushed("theirs"), "theirs"),
        ("mine", pushed(""), "mine"),
        ("new", pushed("old"), "new"),
        ("old", pushed("old", edited="edited there"), "edited there"),
        ("", pushed("", edited="edited there"), "edited there"),
        ("same", pushed("", edited="same"), "same"),
        ("mine", Readme({}, "", "of before mapconv"), None),
        ("mine", pushed("old", edited="edited there"), None),
    ],
)
def test_the_side_that_was_edited_is_kept(local, remote, kept):
    if kept is None:
        with pytest.raises(HubError, match="edited on the Hub and in the local folder"):
            merge_readmes(Readme({}, "", local), remote)
    else:
        assert merge_readmes(Readme({}, "", local), remote).after == kept


def test_metadata_of_both_sides_is_kept_and_the_local_one_wins():
    local = Readme({"license": "mit", "tags": ["a", "b"], "co2": 1})
    remote = Readme({"license": "gpl-3.0", "tags": ["b", "c"], "widget": ["x"]})
    merged = merge_readmes(local, remote).metadata
    assert merged == {"license": "mit", "tags": ["a", "b", "c"], "co2": 1, "widget": ["x"]}


def test_a_good_card_passes_and_a_bad_one_names_its_field():
    good = {"base_model": "a/b", "license": "apache-2.0", "tags": ["map"], "language": "en", "widget": [{"text": "x"}]}
    check_card(compose(good, "block", Readme()))
    for key, value in {
        "base_model": "/x/y",
        "license": 3,
        "tags": [1],
        "pipeline_tag": ["x"],
        "widget": ["~/x"],
    }.items():
        with pytest.raises(HubError, match=key):
            check_card(compose(good | {key: value}, "block", Readme()))


def test_only_plain_words_of_a_strangers_card_are_taken_over(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: {a: b}\ndatasets: [a/b]\nlanguage: [1]\nhidden: x\n---\n")
    assert card_facts(tmp_path) == {"datasets": ["a/b"]}
    (tmp_path / "README.md").write_text("---\n[broken\n---\n")
    assert card_facts(tmp_path) == {}
    assert card_facts(tmp_path / "absent") == {}
