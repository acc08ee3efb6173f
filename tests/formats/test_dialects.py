"""Files of other dialects are recognised by their keys, and named with what to do."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import mapconv
from mapconv.errors import AdapterError, UnsupportedError
from mapconv.formats import read_adapter

#: (a file's usual name, its keys, what the sentence must say)
FILES = {
    "mlx": ("adapters.safetensors", ("model.layers.0.self_attn.q_proj.lora_a",), "mlx_lm.fuse"),
    "unknown": ("song.safetensors", ("blocks.0.lora_something",), "not a PEFT adapter"),
}


@pytest.fixture(params=FILES)
def foreign(request, tmp_path):
    name, keys, words = FILES[request.param]
    (tmp_path / "adapter").mkdir()
    save_file({key: torch.ones(2, 2) for key in keys}, tmp_path / "adapter" / name)
    return tmp_path / "adapter", name, words


@pytest.mark.parametrize("as_file", [False, True])
@pytest.mark.parametrize("config", [None, {"fine_tune_type": "lora", "num_layers": 2}])
def test_named_with_what_to_do(foreign, as_file, config):
    folder, name, words = foreign
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(
        UnsupportedError, match=rf"{name} is an? .*which mapconv cannot read: (convert|merge)"
    ) as caught:
        mapconv.inspect(folder / name if as_file else folder)
    assert words in str(caught.value)


def test_weights_of_peft_without_their_configuration(tmp_path):
    save_file({"base_model.model.lin.lora_A.weight": torch.ones(3, 8)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UnsupportedError, match=r"no adapter_config.json beside it.*rank is 3"):
        read_adapter(tmp_path)


def test_a_model_is_no_adapter(tmp_path):
    save_file({"model.embed_tokens.weight": torch.ones(3, 8)}, tmp_path / "model.safetensors")
    with pytest.raises(AdapterError, match=r"holds no adapter, but tensors such as model\.embed_tokens\.weight"):
        read_adapter(tmp_path)


def test_a_configuration_without_a_method(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterError, match="has no peft_type"):
        read_adapter(tmp_path)


@pytest.mark.parametrize("times", [2, 3])
def test_a_model_that_was_wrapped_again(times, tmp_path):
    prefix = "base_model.model." * times
    tensors = {f"{prefix}lin.lora_A.weight": torch.ones(2, 8), f"{prefix}lin.lora_B.weight": torch.ones(4, 2)}
    save_file(tensors | {f"{prefix}head.weight": torch.ones(3)}, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["lin"], "modules_to_save": ["head"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    adapter = read_adapter(tmp_path)
    assert [module.path for module in adapter.modules] == ["lin"]
    assert [item.parameter for item in adapter.whole] == ["head.weight"]
    assert list(adapter.others) == ["base_model.model.head.weight"]
    assert f"prefix {times} times" in adapter.notes[0]
    (tmp_path / "base").mkdir()
    save_file({"lin.weight": torch.ones(4, 8), "head.weight": torch.zeros(3)}, tmp_path / "base" / "model.safetensors")
    mapconv.upgrade(tmp_path, tmp_path / "map", base=tmp_path / "base")
    assert sorted(load_file(tmp_path / "map" / "adapter_model.safetensors")) == [
        "base_model.model.head.weight",
        "base_model.model.lin.lora_A.weight",
        "base_model.model.lin.lora_B.weight",
    ]


def test_tinker_s_name_of_the_output_embedding(tmp_path):
    key = "base_model.model.model.unembed_tokens.lora_{}.weight"
    tensors = {key.format("A"): torch.ones(2, 8), key.format("B"): torch.ones(4, 2)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": "all-linear"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert [module.path for module in read_adapter(tmp_path).modules] == ["lm_head"]
