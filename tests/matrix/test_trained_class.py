"""The class that an adapter was trained on: its keys say, whatever task its configuration names.

Whole vision-language models are cases of the matrix (``feature-extraction``); here are their bare ones, without a head.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import transformers
from peft import LoraConfig, get_peft_model
from safetensors import safe_open

import mapconv
from tests.copies import Original
from tests.files import copy, edit_json

from .models import MODELS
from .oracle import Workshop, attach_whole, randomise

NAMES = ("qwen2-vl", "llava", "paligemma", "gemma3-vl", "qwen3-vl", "idefics3", "bert-classifier", "gpt2-classifier")


def keys(folder) -> set[str]:
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.fixture(scope="module")
def trained(
    workshop: Workshop, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Original, Path]]:
    """(base, its bare model, an adapter of that); each is made once."""
    root = tmp_path_factory.mktemp("bare")

    @cache
    def make(name: str) -> tuple[Path, Original, Path]:
        base = workshop.bases.folder(name, "default")
        bare = transformers.AutoModel.from_pretrained(base)
        untouched = Original(bare)
        targets = MODELS[name].roles.get("linear") or MODELS[name].roles["conv1d_transposed"]
        model = get_peft_model(bare, LoraConfig(r=2, target_modules=list(targets)))
        randomise(model, seed=3)
        model.save_pretrained(root / name)
        return base, untouched, root / name

    return make


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("task", [None, "FEATURE_EXTRACTION", "CAUSAL_LM"])
def test_an_adapter_of_the_bare_model_keeps_its_names(name, task, trained, tmp_path):
    base, bare, saved = trained(name)
    adapter = copy(saved, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    edit_json(
        adapter / "adapter_config.json",
        task_type=task,
        auto_mapping=config["auto_mapping"] if task is None else None,
    )
    mapconv.upgrade(adapter, tmp_path / "map", base=base)
    assert keys(tmp_path / "map") == keys(adapter)
    edit_json(tmp_path / "map" / "adapter_config.json", task_type=None)
    attach_whole(bare.copy(), tmp_path / "map")
