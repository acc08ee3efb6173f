"""Bases whose class is somebody's own code, which mapconv does not run: names and shapes that agree are enough."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mapconv

PREFIX = "base_model.model."
PATHS = [f"transformer.encoder.layers.{layer}.self_attention.query_key_value" for layer in range(2)]
CONFIGS = {
    "chatglm": {"model_type": "chatglm", "architectures": ["ChatGLMModel"]},
    "glm-4": {"model_type": "chatglm", "architectures": ["ChatGLMForConditionalGeneration"]},
    "qwen-1": {"model_type": "qwen", "architectures": ["QWenLMHeadModel"], "tie_word_embeddings": False},
    "indictrans": {"model_type": "IndicTrans", "architectures": ["IndicTransForConditionalGeneration"]},
    "own-class-of-a-known-type": {"model_type": "llama", "architectures": ["ColLlama"]},
    "no-config": None,
}
TASKS = {"CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION", None}


def write_base(folder: Path, config: dict | None) -> Path:
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    shapes = {f"{path}.weight": (24, 8) for path in PATHS}
    shapes |= {"transformer.embedding.word_embeddings.weight": (40, 8), "transformer.output_layer.weight": (40, 8)}
    save_file({k: torch.randn(v, generator=generator) for k, v in shapes.items()}, folder / "model.safetensors")
    if config is not None:
        auto_map = {"AutoModel": "modeling.Model"}
        (folder / "config.json").write_text(json.dumps({"vocab_size": 40, "auto_map": auto_map} | config))
    return folder


def write_adapter(folder: Path, shapes: dict[str, tuple[int, int]], **settings) -> Path:
    folder.mkdir()
    generator = torch.Generator().manual_seed(2)
    tensors = {}
    for path, (height, width) in shapes.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = torch.randn(2, width, generator=generator)
        tensors[f"{PREFIX}{path}.lora_B.weight"] = torch.randn(height, 2, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["query_key_value"]} | settings
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("task", sorted(TASKS, key=str))
@pytest.mark.parametrize("name", CONFIGS)
def test_linear_factors_need_no_class(name, task, tmp_path):
    base = write_base(tmp_path / "base", CONFIGS[name])
    adapter = write_adapter(tmp_path / "adapter", dict.fromkeys(PATHS, (24, 8)), task_type=task)
    mapconv.merge(adapter, tmp_path / "merged", base=base)
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    factors = load_file(adapter / "adapter_model.safetensors")
    for path in PATHS:
        A, B = (factors[f"{PREFIX}{path}.lora_{part}.weight"] for part in "AB")
        torch.testing.assert_close(after.pop(f"{path}.weight"), before.pop(f"{path}.weight") + 2 * B @ A)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    mapconv.upgrade(adapter, tmp_path / "map", base=base)
    assert load_file(tmp_path / "map" / "adapter_model.safetensors").keys() == factors.keys()


@pytest.mark.parametrize("name", ["chatglm", "qwen-1", "no-config"])
def test_a_misfit_is_blamed_on_the_names(name, tmp_path):
    base = write_base(tmp_path / "base", CONFIGS[name])
    adapter = write_adapter(
        tmp_path / "adapter", {PATHS[0]: (24, 8), PATHS[1].replace("layers.1", "layers.7"): (24, 8)}
    )
    with pytest.raises(mapconv.MapconvError, match=r"1 of the adapter's 2 modules .*\n  .*layers\.7.*: no tensor"):
        mapconv.merge(adapter, tmp_path / "merged", base=base)


class TestVocabulary:
    """An output embedding may be the input's tensor as well, and only a class would tell."""

    PATH = "transformer.output_layer"

    def merge(self, tmp_path, config: dict, *, drop: str | None = None):
        base = write_base(tmp_path / "base", CONFIGS["chatglm"] | config)
        if drop:
            tensors = load_file(base / "model.safetensors")
            del tensors[f"transformer.{drop}.weight"]
            save_file(tensors, base / "model.safetensors")
        adapter = write_adapter(tmp_path / "adapter", {self.PATH: (40, 8)}, target_modules=["output_layer"])
        return mapconv.merge(adapter, tmp_path / "merged", base=base)

    def test_both_ends_are_stored(self, tmp_path):
        assert [item.tensor for item in self.merge(tmp_path, {}).merged] == [f"{self.PATH}.weight"]

    def test_the_configuration_says_that_they_are_two(self, tmp_path):
        self.merge(tmp_path, {"tie_word_embeddings": False}, drop="embedding.word_embeddings")

    def test_one_stored_end_is_not_guessed_at(self, tmp_path):
        with pytest.raises(mapconv.MapconvError, match="may be tied"):
            self.merge(tmp_path, {}, drop="embedding.word_embeddings")
