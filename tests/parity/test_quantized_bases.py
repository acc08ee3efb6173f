"""A quantized base is a base like any other: what it gives is what the values of its codes give, stored plain."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import mapconv
from tests.checkpoint.codecs.encoders import STORAGES
from tests.files import read_tensors
from tests.models import TARGETS, merged_by_peft, save_adapter
from tests.quantized import quantize_with_twin, save_plain


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return save_plain(tmp_path_factory.mktemp("plain") / "base")


@pytest.fixture(scope="module")
def adapters(plain, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    some = [target for target in TARGETS if target not in ("k_proj", "up_proj")]
    return {
        "lora": save_adapter(plain, folder / "lora", target_modules=some),
        "dora": save_adapter(plain, folder / "dora", use_dora=True),
    }


#: One storage of each way to decode: for what costs more than a merge.
SOME = ("nf4-double", "int8", "fp8-ragged", "ct-int4-order", "modelopt-nvfp4", "gptq-3", "awq", "mlx-4")


@pytest.fixture(scope="module")
def all_bases(plain, tmp_path_factory) -> Callable[[str], tuple[Path, Path]]:
    return cache(lambda storage: quantize_with_twin(plain, storage, tmp_path_factory.mktemp("bases")))


@pytest.fixture(params=SOME)
def bases(request, all_bases) -> tuple[Path, Path]:
    return all_bases(request.param)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("storage", STORAGES)
def test_merge(method, storage, all_bases, adapters, tmp_path):
    quantized, twin = all_bases(storage)
    for base, out in [(quantized, "merged"), (twin, "expected")]:
        mapconv.merge(adapters[method], tmp_path / out, base=base, dtype="float32")
    merged, expected = read_tensors(tmp_path / "merged"), read_tensors(tmp_path / "expected")
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in merged)


def test_the_merged_model_is_an_ordinary_one(bases, adapters, tmp_path):
    quantized, twin = bases
    mapconv.merge(adapters["lora"], tmp_path / "merged", base=quantized)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert not {"quantization_config", "quantization"} & config.keys()
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(report.values())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    weights = merged_by_peft(twin, adapters["lora"])
    for name, tensor in model.state_dict().items():
        # One rounding to bfloat16: half a unit in its last place.
        assert torch.allclose(tensor.double(), weights[name].double(), rtol=2**-8, atol=1e-12)


def test_upgrade(bases, adapters, tmp_path):
    """The norms of the values are the base's fingerprint, and a refit starts from the values."""
    quantized, twin = bases
    for method in adapters:
        found = [
            mapconv.upgrade(adapters[method], tmp_path / f"{method}-{base.name}", base=base).modules for base in bases
        ]
        assert [module.to_dict() for module in found[0]] == [module.to_dict() for module in found[1]]
    mapconv.merge(tmp_path / f"lora-{twin.name}", tmp_path / "merged", base=quantized)
