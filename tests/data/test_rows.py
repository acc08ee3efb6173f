"""Data files: what counts as a row, what is refused in one sentence, and hostile lines."""

from __future__ import annotations

import json
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mapconv.data import read_rows
from mapconv.errors import DataError, DependencyError
from tests import examples

USER = {"role": "user", "content": "hi"}


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_any_other_file_is_one_text(tmp_path):
    (tmp_path / "notes.md").write_bytes("\ufeffgr\u00fcn\nblau".encode())
    rows = read_rows(tmp_path / "notes.md")
    assert [row.content for row in rows.rows] == ["grün\nblau"]
    assert rows.from_plain_text


@pytest.mark.parametrize(
    ("entry", "kind", "content"),
    [
        ({"text": "one"}, "text", "one"),
        ({"messages": [USER]}, "chat", {"conversation": [USER], "tools": None}),
        ({"messages": [USER], "tools": [{"name": "f"}]}, "chat", {"conversation": [USER], "tools": [{"name": "f"}]}),
        ({"input": "one", "label": 2}, "labelled", "one"),
    ],
)
@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_kinds_of_rows(form, entry, kind, content, tmp_path):
    path = tmp_path / f"data.{form}"
    if form == "jsonl":
        write(path, [entry, "", entry])
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([entry, entry]), path)
    rows = read_rows(path)
    assert rows.kind == kind
    assert [row.content for row in rows.rows] == [content, content]
    assert [row.number for row in rows.rows] == [1, 3 if form == "jsonl" else 2]
    assert [row.label for row in rows.rows] == [entry.get("label")] * 2


def test_lines_end_at_line_feeds_alone(tmp_path):
    """U+2028 may stand in a JSON string as it is."""
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a\u2028b"}\r\n{"text": "c"}')
    assert [row.content for row in read_rows(path).rows] == ["a\u2028b", "c"]


def test_fields_without_a_use_are_named(tmp_path):
    rows = read_rows(write(tmp_path / "data.jsonl", [{"text": "a", "id": 1, "source": "x"}]))
    assert rows.notes == ("data.jsonl: these fields are not used: id, source",)


BAD = [
    ("{", "not JSON"),
    ("[" * 100_000, "not JSON"),
    ("3", "expected an object"),
    ({"prompt": "a"}, "none of the fields"),
    ({"text": None}, "none of the fields"),
    ({"text": "a", "messages": [USER]}, "unclear"),
    ({"text": 3}, "expected a string"),
    ({"text": "  "}, "text is empty"),
    ('{"text": "\\ud800"}', "half a surrogate pair"),
    ({"messages": []}, "not a list of messages"),
    ({"messages": ["hi"]}, "no role"),
    ({"messages": [{"role": 1, "content": "a"}]}, "no role"),
    ({"messages": [{"role": "user", "content": 1}]}, "content"),
    ({"messages": [USER], "tools": "f"}, "tools"),
    ({"input": ["a"], "label": 1}, "expected a string"),
]


@pytest.mark.parametrize(("line", "reason"), BAD, ids=[f"{number}" for number in range(len(BAD))])
def test_bad_rows_are_counted_and_too_many_are_refused(line, reason, tmp_path):
    kind = json.loads(line) if isinstance(line, str) and line.startswith('{"') else line
    kind = kind if isinstance(kind, dict) else {}
    good = {"messages": [USER]} if "messages" in kind and "text" not in kind else {"text": "good"}
    good = {"input": "good", "label": 0} if "input" in kind else good
    rows = read_rows(write(tmp_path / "data.jsonl", [good] * 50 + [line] + [good] * 49))
    assert len(rows.rows) == 99
    assert [row.number for row in rows.bad] == [51]
    assert reason in rows.bad[0].reason
    with pytest.raises(DataError, match=r"cannot be used \(line"):
        read_rows(write(tmp_path / "only.jsonl", [line]))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n ", "is empty"),
        ("a.txt", b"\xff\xfea\x00", "is not UTF-8 text (byte 0)"),
        ("a.jsonl", b"\n\n", "is empty"),
        ("a.jsonl", b'{"text": "a"}\n\x1f\x8b', "is not UTF-8 text"),
        ("a.jsonl", b'{"text": "a"}\n{"messages": [{"role": "user", "content": "a"}]}', "mixes kinds of rows: line 2"),
        ("a.json", b'[{"text": "a"}]', "one object per line"),
        ("a.parquet", b"PAR1 and no more", "not a Parquet file"),
    ],
)
def test_files_that_are_refused(name, content, said, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        read_rows(tmp_path / name)
    assert said in str(error.value)
    assert str(error.value).startswith(str(tmp_path / name))


def test_a_line_longer_than_any_row_is_named_and_not_held(tmp_path, monkeypatch):
    monkeypatch.setattr("mapconv.data.rows.LONGEST_LINE", 40)
    lines = [json.dumps({"text": str(number)}) for number in range(120)]
    lines[2] = json.dumps({"text": "x" * 1000})
    path = write(tmp_path / "a.jsonl", lines)
    rows = read_rows(path)
    assert [(row.number, row.reason) for row in rows.bad] == [(3, "it is longer than 40 B")]
    assert [row.content for row in rows.rows] == [str(number) for number in range(120) if number != 2]
    path.write_bytes(path.read_bytes() + b'{"text": "\xff"}\n')
    with pytest.raises(DataError, match=rf"byte {path.stat().st_size - 4}"):  # counted over what was left out as well
        read_rows(path)


def test_a_text_that_is_too_long_to_be_one_row(tmp_path, monkeypatch):
    monkeypatch.setattr("mapconv.data.rows.LONGEST_TEXT", 40)
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf" + b"a\r\n" * 12)
    assert read_rows(path).rows[0].content == "a\n" * 12
    path.write_text("a" * 41)
    with pytest.raises(DataError, match="one text of more than 40 B"):
        read_rows(path)


@pytest.mark.parametrize("name", ["absent.txt", "absent.jsonl", "absent.parquet", "."])
def test_a_file_that_cannot_be_opened(name, tmp_path):
    with pytest.raises(DataError, match=r"cannot be read .* with --data"):
        read_rows(tmp_path / name)


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DependencyError, match=r"pip install 'mapconv\[data\]'"):
        read_rows(tmp_path / "data.parquet")


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=4) | st.sampled_from(["user", "a"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["text", "messages", "input", "label", "role", "content", "tools", "x"]), inner, max_size=4
        )
    ),
    max_leaves=8,
)


@settings(max_examples=examples(40))
@given(st.lists(json_values.map(json.dumps) | st.text(max_size=20) | st.binary(max_size=12), max_size=6))
def test_hostile_lines_end_in_rows_or_in_one_sentence(tmp_path_factory, lines):
    path = tmp_path_factory.getbasetemp() / "hostile.jsonl"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode("utf-8", "replace") for line in lines))
    try:
        rows = read_rows(path)
    except DataError as error:
        said = str(error)
    else:
        said = f"{path}: ."
        assert rows.rows
        assert all(isinstance(row.content, dict if rows.kind == "chat" else str) for row in rows.rows)
    assert said.startswith(str(path))
    assert said.endswith(".")
