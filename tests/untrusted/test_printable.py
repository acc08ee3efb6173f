"""Names of strangers at the three borders: they are shown, and can do nothing."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mapconv
from mapconv.cli import output
from mapconv.errors import AdapterError
from mapconv.metadata.readme import Readme, compose, parse_readme
from mapconv.untrusted.printable import markdown_code, markdown_text, page_text, printable, printable_message

HOSTILE = (
    "\x1b[2J\x1b]0;title\x07", "a\nmapconv: error: forged", "a\r\nnote: forged", "\u202eturned", "\ud800", "\x9b31m",
    "<img src=x onerror=alert(1)>", "[x](javascript:alert(1))", "javascript:alert(1)", "![x](http://evil/x.png)",
    "<!-- mapconv:end -->", "a|b", "`code`", "# head", "https://evil", "&lt;b&gt;", "\\", "a\u2028b", "~~x~~",
)  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_line_stays_one_line_of_characters_that_print(name):
    shown = printable(name)
    assert shown.isprintable()
    shown.encode()


@pytest.mark.parametrize("text", ["plain", "α/‖W0‖ → β", "naïve 模型", "ε 1.2e-08"])
def test_what_prints_is_left_alone(text):
    assert printable(text) == text
    assert printable_message(text) == text


def test_only_an_indented_line_follows_in_a_message():
    message = "2 misfits:\n  a: no tensor b\nmapconv: error: forged\n  c"
    assert printable_message(message) == "2 misfits:\n  a: no tensor b\\nmapconv: error: forged\n  c"


@given(st.text(st.characters(), max_size=40))
def test_any_text(text):
    printable(text).encode()
    markdown_text(text).encode()
    assert all(line[:1] in ("", " ") for line in f"x{printable_message(text)}".split("\n")[1:])


@pytest.mark.parametrize("name", HOSTILE)
def test_a_card_shows_a_name_as_text(name):
    shown = markdown_text(name)
    assert "<" not in shown
    assert not any(f"{word}:" in shown for word in ("javascript", "https", "http"))
    # Every character that Markdown reads is behind a backslash.
    plain = shown.replace("\\\\", "").replace("&#8203;", "")
    for mark in "`*[]|~#!":
        assert plain.count(mark) == plain.count(f"\\{mark}")


def test_underscores():
    assert [markdown_text(name) for name in ("q_proj", "_x_", "a__b")] == ["q_proj", "\\_x\\_", "a\\_\\_b"]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_in_a_block_neither_end_it_nor_reach_the_text_around(name):
    block = f"| {markdown_text(name)} | {markdown_code(name)} |"
    own = Readme({}, "before", "after")
    parsed = parse_readme(compose({}, block, own), "x")
    assert parsed.own == ("before", "after")
    assert "<!-- mapconv:end -->" not in block


def test_a_page_keeps_lines_and_loses_controls():
    assert page_text("a\nb\tc\x1b\u202e\ud800") == "a\nb\tc\ufffd\ufffd\ufffd"


def test_tables_and_notes_escape_names(capsys):
    output.print_table(["name", "n"], [["a\nb\x1b[31m", "1"]])
    output.notes(["one\nnote: two"])
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1] == "  a\\nb\\x1b[31m  1"
    assert captured.err == "note: one\\nnote: two\n"


def test_the_command_line_prints_through_its_own_door():
    """click.echo would let a name through as it is; startup.py puts out its own words, and takes them back."""
    folder = Path(mapconv.__file__).parent / "cli"
    calls = {
        path.name
        for path in folder.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "echo"
    }
    assert calls == {"output.py", "errors.py", "startup.py"}


def test_an_error_forges_no_line(run, own_lora):
    hostile = "x\nmapconv: wrote \x1b[2Jeverything"
    result = run("inspect", own_lora.parent / hostile)
    assert result.status == 1
    assert result.err.count("\n") == 1
    assert "\\nmapconv: wrote \\x1b[2Jeverything" in result.err


def test_errors_keep_the_name_as_it_is(tmp_path):
    """A caller in Python finds the file by it."""
    with pytest.raises(AdapterError, match="a\nb"):
        mapconv.inspect(tmp_path / "a\nb")
