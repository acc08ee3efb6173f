"""``mapconv combine`` on mixtures of experts: a DoRA of linear layers beside the LoRAs of a stack."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

import mapconv
from mapconv.errors import UnsupportedError
from mapconv.refit.plan import NO_DORA_OF_STACKS
from tests.matrix.models import MODELS

TINY = MODELS["mixtral"]


def adapter(base: Path, folder: Path, **settings) -> Path:
    model = get_peft_model(TINY.load(base), LoraConfig(r=2, lora_alpha=4, **settings))
    draw = torch.Generator().manual_seed(len(folder.name))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=draw))
            elif "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand(parameter.shape, generator=draw))
    model.save_pretrained(folder)
    return folder


def test_a_dora_beside_stacks_is_combined_into_a_plain_lora(tmp_path: Path) -> None:
    TINY.build().save_pretrained(tmp_path / "base")
    base = tmp_path / "base"
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    stacks = adapter(base, tmp_path / "stacks", target_modules=[], target_parameters=names)
    dora = adapter(base, tmp_path / "dora", target_modules=["q_proj", "v_proj"], use_dora=True)
    result = mapconv.combine([stacks, dora], tmp_path / "out", base=base, weights=[0.5, 1.0], rank=32)
    assert result.plain_lora
    assert NO_DORA_OF_STACKS in result.notes
    assert all(module.base_gain == pytest.approx(1) for module in result.modules)
    assert result.worst_error < 1e-5
    assert sum(module.expert is not None for module in result.modules) == 2 * 2 * 3
    wanted = TINY.load(mapconv.merge(dora, tmp_path / "one", base=base, dtype="float32").out).state_dict()
    half = TINY.load(
        mapconv.merge(stacks, tmp_path / "two", base=base, dtype="float32", weights=[0.5]).out
    ).state_dict()
    merged = TINY.load(mapconv.merge(result.out, tmp_path / "merged", base=base, dtype="float32").out).state_dict()
    for name, before in TINY.load(base).state_dict().items():
        expected = wanted[name] + half[name] - before
        assert torch.allclose(merged[name], expected, atol=1e-5), name
    with pytest.raises(UnsupportedError, match="no DoRA for stacks of experts"):
        mapconv.combine([stacks, dora], tmp_path / "no", base=base, direction="dora")
