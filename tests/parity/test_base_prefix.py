"""A base whose checkpoint lacks the model's prefix, or has one that the adapter lacks."""

from __future__ import annotations

import pytest
import torch

import mapconv
from tests.files import edit_tensors, read_tensors
from tests.models import load_base, log_probabilities, save_adapter


@pytest.fixture
def bare_base(own_base):
    """The checkpoint as ``LlamaModel.save_pretrained`` would name it: no ``model.`` before the layers."""

    def rename(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    edit_tensors(own_base / "model.safetensors", rename)
    return own_base


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_merging_into_a_base_without_the_prefix(method, bare_base, request, tmp_path):
    adapter = request.getfixturevalue(method)
    result = mapconv.merge(adapter, tmp_path / "bare", base=bare_base)
    mapconv.merge(adapter, tmp_path / "merged")
    bare, merged = read_tensors(tmp_path / "bare"), read_tensors(tmp_path / "merged")
    assert bare.keys() == read_tensors(bare_base).keys()
    assert {module.tensor for module in result.merged} <= bare.keys()
    for name, weight in merged.items():
        assert torch.equal(weight, bare[name.removeprefix("model.")]), name


def test_transformers_loads_the_result(bare_base, lora, tmp_path):
    mapconv.merge(lora, tmp_path / "bare", base=bare_base)
    mapconv.merge(lora, tmp_path / "merged")
    bare, merged = (log_probabilities(load_base(tmp_path / name)) for name in ("bare", "merged"))
    assert torch.equal(bare, merged)


def test_an_upgrade_on_either_base_is_the_same_adapter(bare_base, dora, tmp_path):
    mapconv.upgrade(dora, tmp_path / "bare", base=bare_base)
    mapconv.upgrade(dora, tmp_path / "full")
    names = ["adapter_model.safetensors"]
    assert all((tmp_path / "bare" / n).read_bytes() == (tmp_path / "full" / n).read_bytes() for n in names)


def test_a_head_outside_the_prefix_keeps_its_name(bare_base, base, tmp_path):
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    result = mapconv.merge(adapter, tmp_path / "merged", base=bare_base)
    assert "lm_head.weight" in {module.tensor for module in result.merged}
