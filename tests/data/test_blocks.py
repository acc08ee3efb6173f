"""Sequences of tokens: packing, padding, labels, and a held-out part that never overlaps."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mapconv.data import IGNORED, read_blocks, read_dataset, read_rows
from mapconv.errors import DataError
from mapconv.runtime.models import load_tokenizer
from tests import examples

CLASSES = {"good": 0, "bad": 1, "odd": 2}


@pytest.fixture(scope="module")
def tokenizer(base):
    return load_tokenizer(base)


@pytest.fixture
def read(tokenizer, tmp_path):
    """Rows, or a text, as (training data, held-out data)."""

    def dataset(content, length=8, **settings):
        return read_dataset(read_rows(write(tmp_path, content)), tokenizer, length=length, **settings)

    return dataset


def write(folder, content):
    path = folder / ("data.txt" if isinstance(content, str) else "data.jsonl")
    path.write_text(content if isinstance(content, str) else "\n".join(map(json.dumps, content)))
    return path


def letters(count, start=0):
    return "".join(chr(ord("a") + (start + place * (1 + place // 26)) % 26) for place in range(count))


def test_a_plain_text_is_cut_into_blocks_of_which_some_are_held_out(read, tokenizer):
    text = letters(100)
    train, held_out = read(text, held_out=3)
    assert (len(train), len(held_out)) == (9, 3)  # 12 whole blocks; the last four tokens make none
    ids = torch.tensor(tokenizer(text)["input_ids"][:96]).view(12, 8)
    both = [tuple(row) for row in [*train.input_ids.tolist(), *held_out.input_ids.tolist()]]
    assert sorted(both) == sorted(map(tuple, ids.tolist()))
    for part in (train, held_out):
        assert torch.equal(part.labels, part.input_ids)
        assert part.attention_mask.all()


def test_documents_are_packed_with_an_end_between_them(read, tokenizer):
    texts = [letters(5 + number % 3, number) for number in range(20)]
    train, held_out = read([{"text": text} for text in texts], held_out=0.3, seed=3)
    end = tokenizer.eos_token_id
    whole = {(*tokenizer(text)["input_ids"], end): number for number, text in enumerate(texts)}
    owners = []
    for part in (train, held_out):
        assert part.input_ids.shape[1] == 8
        stream, current, found = part.input_ids.flatten().tolist(), [], set()
        for token in stream:
            current.append(token)
            if token == end:
                found.add(whole[tuple(current)])
                current = []
        owners.append(found)
    assert owners[0]
    assert owners[1]
    assert not owners[0] & owners[1]
    # 140 tokens, 0.3 of them: 42, which make five blocks.
    assert len(held_out) in (5, 6)


def test_samples_are_the_first_of_the_training_part(read):
    every, _ = read(letters(200))
    some, _ = read(letters(200), samples=4)
    assert len(some) == 4
    assert torch.equal(some.input_ids, every.input_ids[:4])


@settings(max_examples=examples(40))
@given(
    texts=st.lists(st.text("abcdefgh", min_size=1, max_size=30), min_size=2, max_size=25),
    seed=st.integers(0, 5),
    held_out=st.none() | st.floats(0.01, 0.99) | st.integers(1, 5),
)
def test_the_held_out_part_is_disjoint_and_stable(tokenizer, tmp_path_factory, texts, seed, held_out):
    rows = read_rows(write(tmp_path_factory.getbasetemp(), [{"input": text, "label": len(text) % 3} for text in texts]))
    options = {"length": 64, "held_out": held_out, "seed": seed, "classes": CLASSES}
    if len(set(texts)) < 2:
        with pytest.raises(DataError, match="one to train on and one to hold out"):
            read_dataset(rows, tokenizer, **options)
        return
    train, kept = read_dataset(rows, tokenizer, **options)
    again, kept_again = read_dataset(rows, tokenizer, **options)
    assert (train.fingerprint, kept.fingerprint) == (again.fingerprint, kept_again.fingerprint)
    sides = [{tuple(row) for row in part.rows()} for part in (train, kept)]
    assert not sides[0] & sides[1]
    assert len(train)
    assert len(kept)
    if isinstance(held_out, int):
        assert len(kept) <= held_out
    else:
        assert len(train) + len(kept) == len(texts)  # of so few rows no limit cuts any off


def test_another_seed_holds_out_other_rows(read):
    assert read(letters(400), seed=0)[1].fingerprint != read(letters(400), seed=1)[1].fingerprint


def test_labelled_rows_are_padded_and_know_their_class(read, tokenizer):
    rows = [{"input": letters(3 + number % 7, number), "label": ("good", 1, 2)[number % 3]} for number in range(30)]
    train, held_out = read(rows, classes=CLASSES, objective="task", held_out=5)
    assert (len(train), len(held_out)) == (25, 5)
    expected = {tuple(tokenizer(row["input"])["input_ids"][:8]): n % 3 for n, row in enumerate(rows)}
    for part in (train, held_out):
        assert part.labels.tolist() == [expected[tuple(row)] for row in part.rows()]
        assert (part.input_ids[part.attention_mask == 0] == tokenizer.pad_token_id).all()
    assert train.notes == ("data.jsonl: 4 of 30 rows are cut to 8 tokens",)
    batch = train.batch([0, 1])
    assert batch["input_ids"].shape[1] == max(len(train.rows()[row]) for row in (0, 1))


@pytest.mark.parametrize("label", [3, -1, True, 0.0, "great", None, [1]])
def test_a_label_outside_the_classes(read, label):
    with pytest.raises(DataError, match=r"not one of the model's classes \(0 to 2, or good, bad, odd\)"):
        read([{"input": "a", "label": label}] * 3, classes=CLASSES, objective="task")


def test_distillation_needs_no_labels(read):
    train, _ = read([{"input": letters(4, n)} for n in range(10)], classes=CLASSES)
    assert (train.labels == IGNORED).all()
    train, _ = read([{"text": letters(4, n)} for n in range(10)], classes=CLASSES)
    assert train.labels.shape == (9,)


@pytest.mark.parametrize(
    ("content", "settings", "said"),
    [
        (letters(15), {}, r"has 15 tokens, .* one sequence of 8 .* pass --sequence-length 7"),
        ("ab", {}, r"has 2 tokens, .* give more text\."),
        ([{"text": letters(4)}, {"text": letters(5)}], {}, r"has 11 tokens, .* --sequence-length 5"),
        ([{"input": "a", "label": 0}], {"classes": CLASSES}, "1 usable rows"),
        ([{"input": "a", "label": 0}] * 9, {"classes": CLASSES}, "9 usable rows"),
        ([{"input": "a", "label": 0}] * 9, {}, "for a classifier"),
        ([{"messages": [{"role": "user", "content": "a"}]}], {"classes": CLASSES}, "the model is a classifier"),
        ([{"messages": [{"role": "user", "content": "a"}]}], {}, "has no chat template"),
        ([{"text": "a"}] * 9, {"classes": CLASSES, "objective": "task"}, "has no labels"),
    ],
)
def test_data_that_does_not_do(read, content, settings, said):
    with pytest.raises(DataError, match=said):
        read(content, **settings)


@pytest.mark.parametrize(
    "content", [letters(15), [{"text": letters(4)}, {"text": letters(5)}], [{"text": letters(30)}, {"text": "abc"}]]
)
def test_the_sequence_length_that_is_advised_fits(read, content):
    with pytest.raises(DataError) as error:
        read(content, length=20)
    length = int(str(error.value).rpartition("--sequence-length ")[2].rstrip("."))
    train, held_out = read(content, length=length)
    assert len(train)
    assert len(held_out)


def test_blocks_without_a_split(tokenizer, tmp_path):
    rows = read_rows(write(tmp_path, letters(20)))
    assert [len(row) for row in read_blocks(rows, tokenizer, samples=9, length=8).rows()] == [8, 8]
    assert [len(row) for row in read_blocks(rows, tokenizer, samples=9, length=64).rows()] == [20]
    with pytest.raises(DataError, match="expected at least 2"):
        read_blocks(read_rows(write(tmp_path, "a")), tokenizer, samples=9, length=8)
