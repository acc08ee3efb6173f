"""Text that a model writes itself: its own distribution, from first tokens that differ."""

from __future__ import annotations

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import GenerationConfig

from mapconv.errors import DataError
from mapconv.runtime.models import load_model, load_tokenizer
from mapconv.runtime.sampling import sample_sequences


@pytest.fixture(scope="module")
def writer(half_base):
    return load_model(half_base, dtype="bfloat16", device="cpu"), load_tokenizer(half_base)


def test_texts_begin_differently_and_equal_seeds_write_equal_ones(writer):
    model, tokenizer = writer
    stored = {name: value.clone() for name, value in model.state_dict().items()}
    rows = sample_sequences(model, tokenizer, samples=40, length=6, seed=3)
    assert [len(row) for row in rows] == [6] * 40
    first = {row[0] for row in rows}
    assert len(first) > 5
    assert first.isdisjoint(tokenizer.all_special_ids)
    assert rows == sample_sequences(model, tokenizer, samples=40, length=6, seed=3)
    assert rows != sample_sequences(model, tokenizer, samples=40, length=6, seed=4)
    # What a model holds outside its blocks stays in float32, with the same values.
    assert all(torch.equal(value, stored[name].to(value.dtype)) for name, value in model.state_dict().items())
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


def test_what_a_tokenizer_puts_before_each_text_comes_first(writer):
    model, tokenizer = writer
    start = tokenizer.bos_token_id
    plain = tokenizer.backend_tokenizer.post_processor
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    try:
        rows = sample_sequences(model, tokenizer, samples=4, length=5)
        assert [row[0] for row in rows] == [start] * 4
        assert len({row[1] for row in rows} - {start}) > 1
        assert sample_sequences(model, tokenizer, samples=3, length=1) == [[start]] * 3
    finally:
        tokenizer.backend_tokenizer.post_processor = plain


def test_settings_that_authors_recommend_do_not_bend_the_distribution(writer, monkeypatch):
    model, tokenizer = writer
    wanted = sample_sequences(model, tokenizer, samples=4, length=12)
    recommended = GenerationConfig(repetition_penalty=5.0, min_p=0.9, eos_token_id=model.generation_config.eos_token_id)
    monkeypatch.setattr(model, "generation_config", recommended)
    assert sample_sequences(model, tokenizer, samples=4, length=12) == wanted
    assert model.generation_config is recommended


def test_a_model_that_writes_no_text_asks_for_data(writer):
    model, tokenizer = writer
    with pytest.raises(DataError, match="LlamaModel does not write text: give sample text with --data"):
        sample_sequences(model.model, tokenizer, samples=1, length=4)
