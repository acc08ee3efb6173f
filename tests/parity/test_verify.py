"""The numbers of ``mapconv verify`` against the same numbers computed another way."""

from __future__ import annotations

import math

import pytest
import torch

import mapconv
from mapconv.data.shipped import packaged_text
from mapconv.runtime.models import load_tokenizer
from tests.files import copy, read_tensors
from tests.models import load_adapted, load_base, merged_by_peft

SAMPLES = 2


@pytest.fixture(scope="module")
def tokens(base):
    """The blocks that verify runs: the first ones of 256 tokens."""
    ids = load_tokenizer(base)(packaged_text("sample.txt"), add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[: 256 * SAMPLES]).view(SAMPLES, 256)


@pytest.fixture(scope="module")
def results(dora, tmp_path_factory):
    """A refit at a low rank, so that there is an error to measure, as a MAP directory and merged."""
    folder = tmp_path_factory.mktemp("verify")
    mapconv.upgrade(dora, folder / "map", rank=1)
    mapconv.merge(folder / "map", folder / "merged")
    return folder


@torch.inference_mode()
def logits(model, tokens):
    """(positions that predict a known token, vocabulary), in float64."""
    return model(tokens).logits[:, :-1].double().reshape(-1, model.config.vocab_size)


@pytest.mark.parametrize("kind", ["map", "merged"])
def test_every_number_of_the_report(kind, base, dora, results, tokens):
    report = mapconv.verify(results / kind, dora, samples=SAMPLES)
    source = logits(load_adapted(base, dora), tokens)
    result = logits(load_adapted(base, results / kind) if kind == "map" else load_base(results / kind), tokens)
    plain = logits(load_base(base), tokens)
    divergences = torch.nn.functional.kl_div(
        result.log_softmax(-1), source.log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    base_divergence = torch.nn.functional.kl_div(
        plain.log_softmax(-1), source.log_softmax(-1), reduction="batchmean", log_target=True
    )
    targets = tokens[:, 1:].reshape(-1)
    assert report.tokens == targets.numel() == SAMPLES * 255
    # float32 forward passes in other batch shapes differ by some 1e-6 in a logit.
    assert report.kl == pytest.approx(float(divergences.mean()), rel=1e-3)
    assert report.kl_largest == pytest.approx(float(divergences.max()), rel=1e-3)
    assert report.kl_base == pytest.approx(float(base_divergence), rel=1e-3)
    assert report.top1_agreement == pytest.approx(float((source.argmax(-1) == result.argmax(-1)).double().mean()))
    assert report.largest_logit_difference == pytest.approx(float((source - result).abs().max()), rel=1e-3)
    for name, scores in (("base", plain), ("source", source), ("result", result)):
        perplexity = math.exp(torch.nn.functional.cross_entropy(scores, targets))
        assert getattr(report, f"perplexity_{name}") == pytest.approx(perplexity, rel=1e-5)
    assert 0 < report.kl < report.kl_base


@pytest.mark.parametrize("kind", ["map", "merged"])
def test_every_module_is_compared_by_its_weight(kind, base, dora, results):
    report = mapconv.verify(results / kind, dora, samples=1)
    exact, original = merged_by_peft(base, dora), read_tensors(base)
    built = merged_by_peft(base, results / "map")
    assert len(report.modules) == 14
    for module in report.modules:
        name = f"{module.path}.weight"
        change = (exact[name] - original[name].double()).norm()
        assert module.error == pytest.approx(float((built[name] - exact[name]).norm() / change), rel=1e-3)


def test_an_exact_result_measures_as_one(dora, tmp_path):
    mapconv.merge(dora, tmp_path / "merged")
    report = mapconv.verify(tmp_path / "merged", dora, samples=1)
    assert report.kl <= 1e-8
    assert report.top1_agreement == 1.0
    # PEFT merges in float32 too: two roundings of a weight whose update is about half as large.
    assert report.worst_module.error <= 1e-6


def test_text_of_the_user(base, lora, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox " * 5)
    report = mapconv.verify(copy(lora, tmp_path / "same"), lora, data=text)
    assert report.tokens == 99
    assert report.kl == 0.0
    assert report.largest_logit_difference == 0.0
