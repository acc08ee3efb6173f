"""Configurations of other methods, of refused features, and with fields of the wrong type: each named."""

from __future__ import annotations

import pytest

from mapconv.formats.methods import METHODS
from tests.cli.refusals import assert_refused, nothing_written
from tests.files import edit_json


@pytest.fixture
def refuse(run, own_lora, tmp_path):
    def check(changes, *words):
        edit_json(own_lora / "adapter_config.json", **changes)
        with nothing_written(tmp_path):
            assert_refused(run("inspect", own_lora), *words)
            assert_refused(run("upgrade", own_lora), *words)
            assert_refused(run("merge", own_lora, "-o", tmp_path / "out"), *words)

    return check


@pytest.mark.parametrize("method", ["IA3", "LOHA", "LOKR", "VERA", "OFT"])
def test_another_method_than_the_tensors_are_of(method, refuse):
    refuse({"peft_type": method}, METHODS[method].name, "nothing says which layers it adapts")


def test_an_incomplete_layer_of_another_method(refuse):
    refuse({"peft_type": "ADALORA"}, "AdaLoRA layer", "incomplete")


def test_a_method_without_a_merge(refuse):
    refuse({"peft_type": "PREFIX_TUNING"}, "PREFIX_TUNING", "has no merge")


def test_no_method(refuse):
    refuse({"peft_type": ...}, "peft_type", "LORA")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("alora_invocation_tokens", [3]),
        ("arrow_config", {"top_k": 2}),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "lora_ga"),
        ("a_field_of_tomorrow", 1),
    ],
)
def test_refused_features(name, value, refuse):
    refuse({name: value}, name)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("r", 0),
        ("r", None),
        ("r", "4"),
        ("r", 4.0),
        ("r", True),
        ("lora_alpha", None),
        ("lora_alpha", "8"),
        ("lora_alpha", [8]),
        ("lora_alpha", float("nan")),
        ("lora_alpha", float("inf")),
        ("use_dora", "yes"),
        ("use_rslora", 1),
        ("rank_pattern", ["q_proj"]),
        ("rank_pattern", {"q_proj": None}),
        ("rank_pattern", {"(": 4}),
        ("alpha_pattern", {"q_proj": "8"}),
        # A sound expression by itself, but PEFT puts text before it, where a flag may not stand.
        ("alpha_pattern", {"(?i)Q_PROJ": 8}),
        ("peft_type", 5),
        ("init_lora_weights", 3),
        ("base_model_name_or_path", 5),
        ("base_model_name_or_path", ["a"]),
        ("revision", {}),
        ("revision", 7),
    ],
)
def test_wrong_types(name, value, refuse):
    refuse({name: value}, "adapter_config.json", name)


def test_rank_that_the_tensors_have_not(refuse):
    refuse({"r": 8}, "expected rank 8", "lora_A")


def test_base_that_is_not_on_this_machine(run, own_lora, tmp_path):
    edit_json(own_lora / "adapter_config.json", base_model_name_or_path="/home/somebody/models/llama")
    with nothing_written(tmp_path):
        assert_refused(run("upgrade", own_lora), "/home/somebody/models/llama", "--base")


def test_base_that_is_not_recorded(run, own_lora, tmp_path):
    edit_json(own_lora / "adapter_config.json", base_model_name_or_path=None)
    with nothing_written(tmp_path):
        assert_refused(run("upgrade", own_lora), "--base")


def test_base_that_the_hub_cannot_give(run, own_lora, tmp_path):
    with nothing_written(tmp_path):
        assert_refused(run("upgrade", own_lora, "--base", "nobody/nothing"), "nobody/nothing", "Hub")


@pytest.mark.parametrize("name", ["\0", "x" * 5000, "a/b/c", "~/model", "./absent", "nul\0/x"])
def test_base_names_that_are_no_names(name, run, own_lora, tmp_path):
    edit_json(own_lora / "adapter_config.json", base_model_name_or_path=name)
    with nothing_written(tmp_path):
        assert_refused(run("upgrade", own_lora), "--base")
