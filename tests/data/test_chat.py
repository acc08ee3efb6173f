"""Chats: which tokens are the assistant's, by the template's own mark and by what each turn adds."""

from __future__ import annotations

import json

import pytest

from mapconv.data import IGNORED, read_dataset, read_rows
from mapconv.errors import DataError
from mapconv.runtime.models import load_tokenizer

HEAD = "{% for m in messages %}{{ '(' + m['role'][0] + ':' }}"
PROMPT = "{% if add_generation_prompt %}{{ '(a:' }}{% endif %}"
PLAIN = HEAD + "{{ m['content'] + ')' }}{% endfor %}" + PROMPT
MARKED = (
    HEAD + "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + ')' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + ')' }}{% endif %}{% endfor %}" + PROMPT
)
#: Shows an answer in capitals for as long as nothing follows it.
REWRITING = (
    HEAD + "{{ (m['content'].upper() if loop.last and m['role'] == 'assistant' else m['content']) + ')' }}"
    "{% endfor %}" + PROMPT
)
REFUSING = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + PLAIN


def chat(*turns):
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return {"messages": [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns]}


@pytest.fixture
def read(base, tmp_path):
    """Chats as (one string a row, the part of it that counts)."""

    def shown(rows, template, length=64, **settings):
        tokenizer = load_tokenizer(base)
        tokenizer.chat_template = template
        path = tmp_path / "chats.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        parts = read_dataset(read_rows(path), tokenizer, length=length, **{"objective": "task"} | settings)
        found = {}
        for part in parts:
            for ids, labels in zip(part.rows(), part.labels.tolist(), strict=True):
                text = "".join(tokenizer.convert_ids_to_tokens(ids))
                kept = "".join(c if label != IGNORED else "_" for c, label in zip(text, labels, strict=False))
                found[text] = kept
        return found, parts[0].notes

    return shown


ROWS = [chat("u:hi", "a:you", "u:more", "a:no"), chat("s:be", "u:x", "a:y"), chat("a:first", "u:b")]
EXPECTED = {
    "(u:hi)(a:you)(u:more)(a:no)": "_________you)___________no)",
    "(s:be)(u:x)(a:y)": "______________y)",
    "(a:first)(u:b)": "___first)_____",
}


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["by what a turn adds", "by the template's mark"])
def test_labels_are_the_assistants_turns(read, template):
    found, notes = read(ROWS, template)
    assert found == EXPECTED
    assert notes == ()


def test_distillation_counts_every_token(read):
    found, _ = read(ROWS, PLAIN, objective="distill")
    assert found == {text: text for text in EXPECTED}


def test_chats_without_an_answer_within_the_length_are_left_out(read):
    found, notes = read([*ROWS, chat("u:" + "long" * 9, "a:b")], PLAIN, length=20)
    assert set(found) == {"(u:hi)(a:you)(u:more", "(s:be)(u:x)(a:y)", "(a:first)(u:b)"}
    assert "chats.jsonl: 1 chats have no token of the assistant within 20 tokens and were left out" in notes
    assert "chats.jsonl: 1 of 3 rows are cut to 20 tokens" in notes
    with pytest.raises(DataError, match="no row has a token of the assistant within 5 tokens"):
        read([chat("u:question", "a:b")], PLAIN, length=5)


def test_a_template_that_rewrites_earlier_turns_needs_the_mark(read):
    with pytest.raises(DataError, match="rewrites earlier turns"):
        read([chat("u:hi", "a:you", "u:more", "a:no")], REWRITING)
    found, _ = read([chat("u:hi", "a:deal"), chat("u:ho", "a:bed")], REWRITING)
    assert found == {"(u:hi)(a:DEAL)": "_________DEAL)", "(u:ho)(a:BED)": "_________BED)"}


def test_what_the_template_refuses_is_a_bad_row(read):
    rows = [chat("u:hi", "a:" + "abcdefgh"[n % 8] * (1 + n // 8)) for n in range(120)]
    found, notes = read([*rows, chat("s:be", "u:hi", "a:x")], REFUSING)
    assert notes == (
        "chats.jsonl: 1 of 121 rows cannot be used and were left out "
        "(line 121: the chat template refuses it (TemplateError: no system role))",
    )
    assert all(not text.startswith("(s") for text in found)
    with pytest.raises(DataError, match="1 of 3 rows cannot be used"):
        read(ROWS, REFUSING)


def test_a_template_without_an_end_is_given_up(read, monkeypatch):
    monkeypatch.setattr("mapconv.data.chat.LONGEST_RENDERING", 0.2)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}" + PLAIN
    with pytest.raises(DataError, match=r"takes more than 0\.2 seconds for one conversation"):
        read([chat("u:a", "a:b")] * 4, endless)


@pytest.mark.parametrize("attack", ["''.__class__.__mro__", "messages.append(1)", "cycler.__init__.__globals__.os"])
def test_a_template_reaches_nothing_outside_of_itself(read, attack):
    with pytest.raises(DataError, match="chat template refuses it"):
        read([chat("u:a", "a:b")] * 4, "{{ " + attack + " }}" + PLAIN)
