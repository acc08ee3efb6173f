"""What a combination is compared with: the model of T itself, whatever T is of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mapconv
from mapconv.commands.verify_combination import verify_combination
from mapconv.errors import AdapterError
from tests.models import save_adapter

METHODS = [{"method": "sum"}, {"method": "ties", "density": 0.6}, {"method": "dare-ties", "density": 0.5, "seed": 3}]


@pytest.fixture(scope="module")
def pair(base: Path, dora: Path, models: Path) -> list[Path]:
    """A DoRA, and a LoRA with an embedding, whose weight is stored as columns, and a head."""
    targets = {"target_modules": ["q_proj", "up_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}
    lora = save_adapter(base, models / "verified-lora", seed=9, **targets)
    tensors = load_file(lora / "adapter_model.safetensors")
    changed = {key: value * 1.1 for key, value in tensors.items() if "lm_head" in key}
    changed |= {key: 0.1 * torch.randn(value.shape) for key, value in tensors.items() if "lora_embedding" in key}
    assert len(changed) == 3
    save_file(tensors | changed, lora / "adapter_model.safetensors")
    return [dora, lora]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method["method"])
def test_errors_are_those_of_the_refit(pair, base, method, tmp_path):
    options = {"weights": [0.8, -0.6], **method}
    for name, rank in (("all", 32), ("cut", 3)):
        made = mapconv.combine(pair, tmp_path / name, base=base, rank=rank, **options)
        report = verify_combination(made.out, pair, options, base=base, samples=1, save=True)
        errors = {module.path.removesuffix(".weight"): module.error for module in report.modules}
        assert errors.keys() == {module.path for module in made.modules}
        for module in made.modules:
            assert errors[module.path] == pytest.approx(module.error, rel=1e-3, abs=2e-6)
        if rank == 32:
            assert report.kl < 1e-9 < report.kl_base
        else:
            assert report.kl > 1e-6
        assert (made.out / "verify.json").is_file()


def test_another_sum_is_seen(pair, base, tmp_path):
    made = mapconv.combine(pair, tmp_path / "out", base=base, rank=32, weights=[1, 1])
    report = verify_combination(made.out, pair, {"weights": [1, -1]}, base=base, samples=1)
    assert report.worst_module.error > 0.1


def test_of_other_weights(pair, dora, lora, base, tmp_path):
    made = mapconv.combine([dora, lora], tmp_path / "out", base=base, rank=4)
    with pytest.raises(AdapterError, match="adapts other weights than"):
        verify_combination(made.out, pair, {}, base=base)
