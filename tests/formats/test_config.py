"""What a configuration means, against the scalings and ranks that PEFT gives the layers of a live model."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from mapconv.errors import AdapterError, UnsupportedError
from mapconv.formats.config import parse_settings
from mapconv.formats.peft import natural_order
from tests.models import TARGETS, load_base

PATH = Path("adapter_config.json")


def as_saved(config: LoraConfig) -> dict:
    table = config.to_dict() | {"peft_type": "LORA", "task_type": "CAUSAL_LM"}
    table["target_modules"] = sorted(table["target_modules"])
    return table


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize(
    "patterns",
    [
        {},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 5}},
        {"rank_pattern": {r"layers\.0\..*": 3, "q_proj": 2}},
        {"rank_pattern": {"q_proj": 2, r"layers\.0\..*": 3}},
        {"alpha_pattern": {"self_attn.v_proj": 1, "v_proj": 2, "model.layers.1.mlp.up_proj": 3}},
        # A dot matches any character, and a key must match the path to its end.
        {"rank_pattern": {"layers.0": 7, "roj": 7, "up.proj": 6, "mlp.*": 5, "^model.layers.1.self_attn.k_proj": 4}},
        {"rank_pattern": {"k_proj|v_proj": 2}, "alpha_pattern": {r"[qk]_proj": 9}},
    ],
)
def test_ranks_and_scalings_are_those_of_a_live_model(patterns, use_rslora, base):
    config = LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, use_rslora=use_rslora, **patterns)
    settings = parse_settings(as_saved(config), PATH)
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in get_peft_model(load_base(base), config).named_modules()
        if isinstance(layer, LoraLayer)
    }
    assert len(layers) == 14
    for path, layer in layers.items():
        assert settings.rank_of(path) == layer.r["default"], path
        assert settings.scaling_of(path) == pytest.approx(layer.scaling["default"], rel=1e-15), path


def test_every_field_of_pefts_own_config_is_known_at_its_default():
    """PEFT writes all its fields: none of them may be a field that mapconv does not know."""
    settings = parse_settings(as_saved(LoraConfig(target_modules=["q_proj"])), PATH)
    assert (settings.rank, settings.alpha, settings.use_dora, settings.use_rslora) == (8, 8.0, False, False)


def test_a_config_of_peft_0_3():
    old = {
        "base_model_name_or_path": "decapoda-research/llama-7b-hf", "bias": "none", "enable_lora": None,
        "fan_in_fan_out": False, "inference_mode": True, "lora_alpha": 16, "lora_dropout": 0.05,
        "merge_weights": False, "modules_to_save": None, "peft_type": "LORA", "r": 8,
        "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM",
    }  # fmt: skip
    settings = parse_settings(old, PATH)
    assert settings.scaling_of("model.layers.0.self_attn.q_proj") == 2.0
    assert settings.base == "decapoda-research/llama-7b-hf"


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal"])
def test_initialisations_that_leave_the_base_alone_are_accepted(init):
    assert parse_settings({"peft_type": "LORA", "r": 2, "init_lora_weights": init}, PATH).rank == 2


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({}, AdapterError),
        ({"peft_type": "LOHA"}, UnsupportedError),
        ({"peft_type": "LORA", "init_lora_weights": "loftq"}, UnsupportedError),
        ({"peft_type": "LORA", "use_qalora": True}, UnsupportedError),
        ({"peft_type": "LORA", "r": -1}, AdapterError),
    ],
)
def test_errors_name_the_file(config, error):
    with pytest.raises(error, match=PATH.name):
        parse_settings(config, PATH)


def test_natural_order():
    paths = ["layers.10.b", "layers.2.b", "layers.2.a", "head", "layers.2", "10", "9.x"]
    assert sorted(paths, key=natural_order) == [
        "9.x", "10", "head", "layers.2", "layers.2.a", "layers.2.b", "layers.10.b",
    ]  # fmt: skip
    assert natural_order("layers." + "1" * 10_000)  # more digits than int() takes
