"""Classifiers: one position a text, and the head that the adapter brings."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForSequenceClassification

import mapconv
from tests.models import TARGETS, save_tokenizer, tiny_config

NAMES = ["bad", "good", "odd"]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A DoRA classifier with its own head, the MAP form, and texts whose class is in their first letter."""
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    config = tiny_config(num_labels=3, id2label=dict(enumerate(NAMES)), label2id={n: i for i, n in enumerate(NAMES)})
    LlamaForSequenceClassification(config).save_pretrained(folder / "base")
    save_tokenizer(folder / "base")
    model = LlamaForSequenceClassification.from_pretrained(folder / "base")
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="SEQ_CLS", use_dora=True)
    model = get_peft_model(model, settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name and "magnitude" not in name:
                parameter.normal_(std=0.15)
            elif "magnitude" in name:
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
            elif "score.modules_to_save" in name:
                parameter.normal_(std=0.5)
    model.save_pretrained(folder / "dora")
    mapconv.upgrade(folder / "dora", folder / "map")
    rows = [{"input": "abc"[n % 3] * (1 + n % 4) + " word number " + str(n), "label": NAMES[n % 3]} for n in range(60)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.mark.parametrize("objective", ["distill", "task"])
def test_a_classifier_gains(objective, classifier, tmp_path):
    result = mapconv.calibrate(
        classifier / "map", against=classifier / "dora", data=classifier / "data.jsonl", out=tmp_path / "out",
        objective=objective, train="all", steps=8, batch_size=16, held_out=12, sequence_length=32, learning_rate=5e-3,
    )  # fmt: skip
    assert result.report.held_out_positions == 12
    measure = "kl" if objective == "distill" else "loss"
    before, after = (getattr(result.models[name], measure) for name in ("closed form", "calibrated"))
    assert after < 0.9 * before
    assert result.models["calibrated"].perplexity is None
    # The head came with the adapter and is not trained.
    assert result.models["base"].kl > result.models["closed form"].kl


def test_verify_reads_the_same_file(classifier):
    report = mapconv.verify(classifier / "map", classifier / "dora", data=classifier / "data.jsonl", samples=7)
    assert report.tokens == 7
