"""The class that an adapter was trained on: its keys say, whatever task its configuration names.

Whole vision-language models are cases of the matrix (``feature-extraction``); here are their bare ones, without a head.
"""

from __future__ import annotations

import json

import pytest
import transformers
from peft import LoraConfig, get_peft_model
from safetensors import safe_open

import mapconv

from .models import MODELS
from .oracle import Workshop, attach_whole, randomise

NAMES = ("qwen2-vl", "llava", "paligemma", "gemma3-vl", "qwen3-vl", "idefics3", "bert-classifier", "gpt2-classifier")


def keys(folder) -> set[str]:
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("task", [None, "FEATURE_EXTRACTION", "CAUSAL_LM"])
@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_of_the_bare_model_keeps_its_names(name, task, workshop: Workshop, tmp_path):
    base = workshop.bases.folder(name, "default")
    bare = transformers.AutoModel.from_pretrained(base)
    targets = MODELS[name].roles.get("linear") or MODELS[name].roles["conv1d_transposed"]
    model = get_peft_model(bare, LoraConfig(r=2, target_modules=list(targets)))
    randomise(model, seed=3)
    model.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    mapping = config["auto_mapping"] if task is None else None
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps(config | {"task_type": task, "auto_mapping": mapping})
    )
    mapconv.upgrade(tmp_path / "adapter", tmp_path / "map", base=base)
    assert keys(tmp_path / "map") == keys(tmp_path / "adapter")
    record = json.loads((tmp_path / "map" / "adapter_config.json").read_text())
    (tmp_path / "map" / "adapter_config.json").write_text(json.dumps(record | {"task_type": None}))
    attach_whole(transformers.AutoModel.from_pretrained(base), tmp_path / "map")
