"""Sequence classifiers as their users run them: upgraded, merged, and loaded by ``pipeline``."""

from __future__ import annotations

import shutil

import pytest
from transformers import pipeline

import mapconv
from tests.models import save_tokenizer

from .models import MODELS
from .options import OPTIONS
from .tiny import VOCAB


@pytest.mark.parametrize("name", ["gpt2-classifier", "distilbert-classifier"])
def test_a_classifier_answers_in_a_pipeline(name, workshop, tmp_path):
    option = next(option for option in OPTIONS if option.name == "classifier-bare-base")
    case = workshop.case(MODELS[name], option)
    base = shutil.copytree(case.base, tmp_path / "base")
    save_tokenizer(base, VOCAB)
    mapconv.upgrade(case.adapter, tmp_path / "map", base=base)
    mapconv.merge(tmp_path / "map", tmp_path / "merged", base=base)
    classify = pipeline("text-classification", model=str(tmp_path / "merged"), device="cpu", top_k=None)
    answer = classify("a good boat")
    answer = answer[0] if isinstance(answer[0], list) else answer
    # As many labels as the adapter's head has, not the two of the base's own configuration.
    assert {entry["label"] for entry in answer} == {f"LABEL_{i}" for i in range(MODELS[name].settings["num_labels"])}
    assert sum(entry["score"] for entry in answer) == pytest.approx(1, abs=1e-5)
