"""What ``load_adapter`` and ``get_map_model`` refuse, in one sentence, with the model left as it was."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from mapconv.errors import AdapterError, BaseMismatchError, MapconvError, PlacementError, UnsupportedError
from mapconv.nn import MapConfig, detach, disabled, get_map_model, load_adapter, map_layers, set_adapter
from tests.files import copy, edit_json, edit_tensors
from tests.models import TARGETS, load_adapted, load_base, log_probabilities, tiny_config
from tests.models import save_adapter as save_with_peft
from tests.nn.test_running import close

WEIGHTS = "adapter_model.safetensors"
UP = "base_model.model.model.layers.1.mlp.up_proj"


def assert_refused(model, folder, error: type[MapconvError], *words: str, **options) -> None:
    before = [(name, id(module)) for name, module in model.named_modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(error) as caught:
        load_adapter(model, folder, **options)
    sentence = str(caught.value).splitlines()[0]
    assert sentence.endswith((".", "?", ":"))
    for word in words:
        assert word in str(caught.value), (word, str(caught.value))
    assert [(name, id(module)) for name, module in model.named_modules()] == before
    assert [parameter.requires_grad for parameter in model.parameters()] == flags


@pytest.fixture
def model(base):
    return load_base(base)


@pytest.fixture
def own_map(map_dir, tmp_path):
    return copy(map_dir, tmp_path / "own-map")


def test_another_base(other_base, map_dir):
    model = load_base(other_base)
    assert_refused(model, map_dir, BaseMismatchError, "down_proj has norm", "check_base=False")
    load_adapter(model, map_dir, check_base=False)
    assert len(map_layers(model)) == 14


def test_another_base_in_bfloat16_is_still_told_apart(other_base, map_dir):
    assert_refused(load_base(other_base, torch.bfloat16), map_dir, BaseMismatchError, "has norm")


def test_another_shape(map_dir):
    model = LlamaForCausalLM(tiny_config(intermediate_size=40))
    assert_refused(model, map_dir, PlacementError, "6 of the adapter's 14 modules", "[40, 32]", "[48, 32]")


def test_a_model_without_the_layers(map_dir):
    model = LlamaForCausalLM(tiny_config(num_hidden_layers=1))
    assert_refused(model, map_dir, PlacementError, "7 of the adapter's 14 modules", "model.layers.1.mlp.down_proj")


def test_a_file_that_lacks_a_targeted_module(model, own_lora):
    edit_tensors(own_lora / WEIGHTS, lambda t: [t.pop(f"{UP}.lora_{part}.weight") for part in "AB"])
    assert_refused(model, own_lora, PlacementError, "model.layers.1.mlp.up_proj", "incomplete")


@pytest.mark.parametrize("part", ["lora_A.weight", "lora_magnitude_vector"])
def test_values_that_are_not_finite(model, own_map, part):
    edit_tensors(own_map / WEIGHTS, lambda tensors: tensors[f"{UP}.{part}"].view(-1)[0].fill_(float("nan")))
    assert_refused(model, own_map, AdapterError, f"{UP}.{part} holds NaN")


def test_factors_and_scalars_of_two_adapters(model, own_map):
    edit_tensors(own_map / WEIGHTS, lambda tensors: tensors[f"{UP}.lora_B.weight"].mul_(1.01))
    assert_refused(model, own_map, AdapterError, "do not belong together", "up_proj")


def test_an_error_that_was_not_measured_is_null_and_nothing_else(own_map):
    from mapconv.formats import read_adapter

    table = json.loads((own_map / "map_config.json").read_text())
    for value in ("small", float("nan"), []):
        table["modules"][0]["error"] = value
        edit_json(own_map / "map_config.json", modules=table["modules"])
        with pytest.raises(AdapterError, match="map_config"):
            read_adapter(own_map)


@pytest.mark.parametrize("name", ["", "a.b", "train", "keys", "1st", "with space"])
def test_names_that_no_parameter_can_have(model, map_dir, name):
    assert_refused(model, map_dir, AdapterError, "cannot name an adapter", name=name)


def test_a_name_twice_and_a_name_unknown(model, map_dir, lora):
    load_adapter(model, map_dir, name="map")
    assert_refused(model, lora, AdapterError, "'map' already", name="map")
    for call in (set_adapter, detach):
        with pytest.raises(AdapterError, match="no adapter named 'other': it has 'map'"):
            call(model, "other")
    with pytest.raises(ValueError, match="trainable"):
        load_adapter(model, lora, name="other", trainable="alpha")
    with pytest.raises(AdapterError, match="has no MAP adapter"):
        set_adapter(model.model, "map")


def test_a_model_that_peft_has_wrapped(base, lora, map_dir):
    model = get_peft_model(load_base(base), LoraConfig(r=2, target_modules=TARGETS[:1]))
    assert_refused(model, map_dir, UnsupportedError, "PEFT")
    with pytest.raises(UnsupportedError, match="PEFT"):
        get_map_model(load_adapted(base, lora), MapConfig())


def test_pefts_get_peft_model_says_what_to_call(base):
    with pytest.raises(TypeError, match=r"call mapconv\.get_map_model"):
        get_peft_model(load_base(base), MapConfig())


def test_a_model_without_values(map_dir):
    with torch.device("meta"):
        model = LlamaForCausalLM(tiny_config())
    assert_refused(model, map_dir, UnsupportedError, "meta device")
    with pytest.raises(UnsupportedError, match="meta device"):
        get_map_model(model, MapConfig())


def test_a_head_of_another_size(base, tmp_path):
    adapter = save_with_peft(base, tmp_path / "head", target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = LlamaForCausalLM(tiny_config(vocab_size=72))
    assert_refused(model, adapter, PlacementError, "[64, 32]", "lm_head.weight is [72, 32]", "resize_token_embeddings")
    assert_refused(load_base(base).model, adapter, PlacementError, "no parameter lm_head.weight")


def test_a_failed_load_leaves_a_running_adapter_running(model, base, map_dir, own_lora):
    load_adapter(model, map_dir, name="map")
    edit_tensors(own_lora / WEIGHTS, lambda tensors: tensors[f"{UP}.lora_A.weight"].fill_(float("inf")))
    assert_refused(model, own_lora, AdapterError, "NaN or infinity", name="other")
    assert close(log_probabilities(model), log_probabilities(load_adapted(base, map_dir)))
    with pytest.raises(ZeroDivisionError), disabled(model):
        raise ZeroDivisionError
    assert close(log_probabilities(model), log_probabilities(load_adapted(base, map_dir)))
