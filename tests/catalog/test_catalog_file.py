"""A catalog is checked as a whole before anything is converted; each fault is named with its line."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mapconv.catalog.checking import output_fault
from mapconv.catalog.entries import STAGES
from mapconv.catalog.reading import read_catalog
from mapconv.errors import CatalogError
from tests import examples


def faults(path: Path) -> dict[int, str]:
    with pytest.raises(CatalogError) as caught:
        read_catalog(path)
    first, *lines = str(caught.value).splitlines()
    assert first.startswith(f"{path} has {len(lines)} fault")
    found = [line.removeprefix("  line ").partition(": ") for line in lines]
    assert [int(line) for line, _, _ in found] == sorted(int(line) for line, _, _ in found)
    return {int(line): text for line, _, text in found}


def test_every_fault_of_a_yaml_catalog_with_its_line(tmp_path):
    path = tmp_path / "catalog.yaml"
    path.write_text(
        """\
defaults:
  base: /models/llama
  upgrade:
    rank: many
adapters:
- source: a
- base: /models/other
- source: b
  output: ../escape
- source: c
  colour: red
- source: d
  rank: 4
- source: e
  upgrade:
    ranks: 4
    direction: sideways
    lora_compatible: 1
    tolerance: .nan
    max_rank: 0
- source: a
- source: f
  output: /etc
- source: g
  push: {token: secret, private: "yes"}
- source: h
  merge: 3
- source: [1, 2]
- just a text
- source: i
  source: j
- source: k
  output: x/./y
  upgrade: {out: elsewhere}
- source: l
  calibrate: {steps: 4}
"""
    )
    found = faults(path)
    words = {
        4: ['rank is "many"', "a whole number"],
        7: ["source is missing"],
        9: ["../escape", "points outside"],
        11: ["colour"],
        13: ["rank", "belongs below upgrade"],
        16: ["ranks", "no such option"],
        17: ["sideways", "low-rank or dora"],
        18: ["lora_compatible is 1", "true or false"],
        19: ["tolerance", "a number"],
        20: ["max_rank is 0", "at least 1"],
        21: ["'a' is taken by line 6"],
        23: ["/etc", "points outside"],
        27: ["merge is 3", "a table"],
        28: ["[1, 2]"],
        29: ["just a text"],
        31: ["'source' occurs twice"],
        34: ["out", "the run sets it"],
        36: ["calibrate: data is missing"],
    }
    for line, parts in words.items():
        assert all(part in found.get(line, "") for part in parts), (line, found.get(line))
    assert found.keys() - words.keys() == {25, 33}
    assert "secret" not in str(found)


def test_faults_of_a_jsonl_catalog(tmp_path):
    path = tmp_path / "catalog.jsonl"
    path.write_text(
        '{"defaults": {"upgrade": {"dtype": "bfloat16"}}}\n{"source": "a"}\n{"source": "b"\n\n[]\n'
        '{"source": "c", "source": "d"}\n{"defaults": {}}\n{"source": "a/"}\n'
        '{"source": "e", "upgrade": {"rank": true}}\n'
        + '{"source": "' + "x" * (1 << 20) + '"}\n{"source": "never read"}\n'
    )  # fmt: skip
    found = faults(path)
    assert found.keys() == {3, 5, 6, 7, 8, 9, 10}
    assert "not JSON" in found[3]
    assert "occurs twice" in found[6]
    assert "taken by line 2" in found[8]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("adapters:\n- &a {source: x}\n- *a\n", 3),
        ("adapters: " + "[" * 5000, 1),
        ("adapters:\n  - source: 'x\n", 2),
        ("adapters: {a: b}\n", 1),
        ("adapters:\n- source: 2001-02-31\n", 2),
        ("? [a, b]\n: c\n", 1),
        ("- source: !!python/object:os.system x\n", 1),
        ("", 1),
    ],
)
def test_hostile_yaml(text, line, tmp_path):
    path = tmp_path / "catalog.yaml"
    path.write_text(text)
    assert line in faults(path) or text.startswith("adapters:\n  -")


@settings(max_examples=examples(80))
@given(st.binary(max_size=200))
@example(b"\xff\xfe")
@example(b'{"source": "\\ud800"}')
@example(b"{" + b'"a":[' * 2000)
@pytest.mark.parametrize("suffix", ["yaml", "jsonl"])
def test_any_bytes_are_entries_or_faults(suffix, tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / f"fuzz.{suffix}"
    path.write_bytes(data)
    with contextlib.suppress(CatalogError):
        assert read_catalog(path)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*STAGES, "rank", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=examples(80))
@given(st.dictionaries(st.sampled_from(["source", "base", "output", *STAGES, "y"]), VALUES, max_size=5))
def test_any_entry_is_read_or_refused(tmp_path_factory, entry):
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_text(json.dumps(entry))
    try:
        (found,) = read_catalog(path)
    except CatalogError:
        return
    assert list(found.sources) == (entry["source"] if isinstance(entry["source"], list) else [entry["source"]])
    assert output_fault(found.name) is None


def test_defaults_are_taken_over_option_by_option(tmp_path):
    path = tmp_path / "catalog.yaml"
    (tmp_path / "near").mkdir()
    path.write_text(
        "defaults: {base: near, upgrade: {dtype: bfloat16, rank: 8}, verify: true}\n"
        "adapters:\n"
        "- {source: far/poems@main, upgrade: {rank: 9}}\n"
        "- {source: near/, base: other, verify: false, output: a/b, merge: true}\n"
        "- {source: ./more/songs}\n"
    )
    first, second, third = read_catalog(path)
    assert (first.name, first.sources, first.base) == ("poems", ("far/poems@main",), str(tmp_path / "near"))
    assert first.options.stages == {"upgrade": {"dtype": "bfloat16", "rank": 9}, "verify": {}}
    assert (second.name, second.sources, second.base) == ("a/b", (str(tmp_path / "near"),), "other")
    assert second.options.stages == {"upgrade": {"dtype": "bfloat16", "rank": 8}, "merge": {}}
    assert second.merged == "a/b-merged"
    assert (third.name, third.line) == ("songs", 5)


def test_a_folder_of_adapters(tmp_path):
    for name in (
        "b/adapter_config.json",
        "a/adapter_model.bin",
        "deep/c/adapter_config.json",
        ".git/adapter_config.json",
    ):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("{}")
    (tmp_path / "b" / "checkpoint-5").mkdir()
    (tmp_path / "b" / "checkpoint-5" / "adapter_config.json").write_text("{}")
    assert [entry.name for entry in read_catalog(tmp_path)] == ["a", "b", "deep/c"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(CatalogError, match="no folders"):
        read_catalog(tmp_path / "empty")


UNSAFE = (
    "..",
    "a/../b",
    "/a",
    ".",
    "",
    " ",
    ".hidden",
    "a/.b",
    "a//b",
    "a/",
    "a\\b",
    "a\0b",
    "ledger.jsonl",
    "x" * 300,
    3,
)


@pytest.mark.parametrize("name", UNSAFE)
def test_unsafe_names(name):
    assert output_fault(name)


@pytest.mark.parametrize("name", ["a", "a/b", "poems-v1.2", "ü", "a b", "a..b"])
def test_safe_names(name):
    assert output_fault(name) is None


@pytest.mark.parametrize(
    ("stage", "options", "said"),
    [
        ("upgrade", "rank: 4, tolerance: 0.1", "rank and tolerance cannot be used together"),
        ("upgrade", "max_rank: 4", "max_rank requires tolerance"),
        ("upgrade", "lora_compatible: true, direction: dora", "cannot be used together"),
        ("upgrade", "samples: 4", "samples requires data"),
        ("upgrade", "calibrate: 4", "calibrate requires data"),
        ("upgrade", "data: nowhere.txt", "there is none of that name"),
        ("merge", "max_shard_size: 5", "5GB"),
        ("push", "repo_id: poems", "owner/name"),
    ],
)
def test_what_cannot_work_is_refused_before_the_run(stage, options, said, tmp_path):
    path = tmp_path / "catalog.yaml"
    path.write_text(f"adapters:\n- source: a\n  {stage}: {{{options}}}\n")
    assert said in faults(path)[3]


def test_an_entry_is_checked_with_the_defaults(tmp_path):
    path = tmp_path / "catalog.yaml"
    path.write_text(
        "defaults: {upgrade: {rank: 4}}\nadapters:\n- source: a\n- source: b\n  upgrade: {tolerance: 0.1}\n"
        "- {source: c, merge: {max_shard_size: 5GB}}\n"
    )
    assert list(faults(path)) == [5]
    path.write_text(path.read_text().replace("tolerance: 0.1", "rank: null, tolerance: 0.1"))
    entries = read_catalog(path)
    assert entries[1].options.stages["upgrade"] == {"rank": None, "tolerance": 0.1}
    assert entries[2].options.stages["merge"] == {"max_shard_size": 5 * 10**9}
