"""Adapters with a tensor too many, too few, of the wrong shape or with impossible values: each named."""

from __future__ import annotations

import math

import pytest
import torch

from tests.cli.refusals import assert_refused, nothing_written
from tests.files import edit_json, edit_tensors

WEIGHTS = "adapter_model.safetensors"
Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def refuse(run, base, own_lora, own_dora, tmp_path):
    """``upgrade`` and ``merge`` refuse an adapter, in the same words, and write nothing."""

    def check(change, *words, adapter=own_lora):
        edit_tensors(adapter / WEIGHTS, change)
        with nothing_written(tmp_path):
            assert_refused(run("upgrade", adapter), *words)
            assert_refused(run("merge", adapter, "-o", tmp_path / "out"), *words)

    return check


def test_stray_tensor(refuse):
    refuse(lambda tensors: tensors.update({"base_model.model.extra": torch.ones(2)}), "base_model.model.extra")


@pytest.mark.parametrize(("part", "other"), [("lora_A", "lora_B"), ("lora_B", "lora_A")])
def test_missing_factor(part, other, refuse):
    refuse(lambda tensors: tensors.pop(f"{Q}.{part}.weight"), "model.layers.0.self_attn.q_proj", f"no {part}")


def test_missing_magnitude(refuse, own_dora):
    refuse(
        lambda tensors: tensors.pop(f"{Q}.lora_magnitude_vector"),
        "q_proj has no lora_magnitude_vector",
        adapter=own_dora,
    )


def test_magnitude_of_an_adapter_that_says_it_is_no_dora(refuse, own_dora):
    edit_json(own_dora / "adapter_config.json", use_dora=False)
    refuse(lambda tensors: None, "lora_magnitude_vector", "use_dora", adapter=own_dora)


def test_missing_module(refuse):
    def change(tensors):
        for part in ("lora_A", "lora_B"):
            del tensors[f"{Q}.{part}.weight"]

    refuse(change, "model.layers.0.self_attn.q_proj", "incomplete")


def test_module_that_the_base_has_not(refuse):
    def change(tensors):
        for part in ("lora_A", "lora_B"):
            name = f"{Q}.{part}.weight"
            tensors[name.replace("layers.0", "layers.7")] = tensors[name].clone()

    refuse(change, "model.layers.7.self_attn.q_proj", "1 of the adapter's 15 modules")


@pytest.mark.parametrize(
    ("part", "shape"),
    [("lora_A", (4, 31)), ("lora_B", (33, 4)), ("lora_A", (5, 32)), ("lora_B", (32, 3)), ("lora_A", (4, 32, 1))],
)
def test_wrong_shape(part, shape, refuse):
    refuse(lambda tensors: tensors.update({f"{Q}.{part}.weight": torch.ones(shape)}), "model.layers.0.self_attn.q_proj")


@pytest.mark.parametrize("shape", [(31,), (1,), (32, 1)])
def test_wrong_shape_of_the_magnitude(shape, refuse, own_dora):
    name = f"{Q}.lora_magnitude_vector"
    refuse(lambda tensors: tensors.update({name: torch.ones(shape)}), name, list(shape), adapter=own_dora)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("part", ["lora_A.weight", "lora_B.weight", "lora_magnitude_vector"])
def test_values_that_are_not_finite(part, value, refuse, own_dora):
    def change(tensors):
        tensors[f"{Q}.{part}"].view(-1)[5] = value

    refuse(change, f"{Q}.{part}", "NaN or infinity", adapter=own_dora)


def test_integers(refuse):
    name = f"{Q}.lora_A.weight"
    refuse(lambda tensors: tensors.update({name: torch.ones(4, 32, dtype=torch.int32)}), name, "I32")


def test_the_same_tensor_twice(refuse):
    def change(tensors):
        tensors[f"{Q}.lora_A.default.weight"] = tensors[f"{Q}.lora_A.weight"].clone()

    refuse(change, "lora_A.default.weight", "same tensor")


def test_two_modules_on_one_weight(refuse):
    def change(tensors):
        for part in ("lora_A", "lora_B"):
            name = f"{Q}.{part}.weight"
            tensors[name.removeprefix("base_model.model.")] = tensors[name].clone()

    refuse(change, "same tensor")


@pytest.mark.parametrize(
    ("name", "feature"),
    [
        ("base_model.model.model.embed_tokens.lora_embedding_A", "embedding"),
        (f"{Q}.lora_B.bias", "bias"),
        ("base_model.model.lm_head.base_layer.weight", "lm_head.weight is [64, 32]"),
        ("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", "trainable_token_indices"),
    ],
)
def test_tensors_that_do_not_fit_what_they_say_they_are(name, feature, refuse):
    refuse(lambda tensors: tensors.update({name: torch.ones(4)}), name, feature)


@pytest.mark.parametrize(("scale", "dtype"), [(1e6, "float16"), (1e38, "float32")])
def test_factors_that_overflow_the_output(scale, dtype, run, own_lora, tmp_path):
    """s·B is folded into one stored factor: it must fit in the dtype, or nothing may be written."""
    edit_json(own_lora / "adapter_config.json", lora_alpha=400)
    edit_tensors(own_lora / WEIGHTS, lambda tensors: tensors[f"{Q}.lora_B.weight"].mul_(scale))
    with nothing_written(tmp_path):
        assert_refused(run("upgrade", own_lora, "--dtype", dtype), "q_proj", dtype)
