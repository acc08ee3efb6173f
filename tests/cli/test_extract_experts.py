"""``mapconv extract`` on mixtures of experts: their stacks are refitted, and stock PEFT computes the finetune."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel

import mapconv
from mapconv.errors import UnsupportedError
from tests.matrix.models import MODELS
from tests.matrix.tiny import Tiny


def pair(tiny: Tiny, folder: Path, *, also: str = "") -> tuple[Path, Path]:
    """A base and a finetune of it, in which the stacks, q_proj and what is named ``also`` differ."""
    model = tiny.build().eval()
    model.save_pretrained(folder / "base")
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            stack = "experts." in name and parameter.dim() == 3
            if stack or "q_proj.weight" in name or (also and also in name):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    model.save_pretrained(folder / "tuned")
    return folder / "base", folder / "tuned"


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "gpt-oss"])
def test_stacks_come_back(name: str, tmp_path: Path) -> None:
    tiny = MODELS[name]
    base, tuned = pair(tiny, tmp_path, also="bias")
    result = mapconv.extract(tuned, tmp_path / "out", base=base, rank=32)
    assert result.plain_lora
    assert result.worst_error < 1e-5
    experts = [module for module in result.modules if module.expert is not None]
    layers = 2
    assert len(experts) == layers * 2 * 3  # two stacks of three experts a layer
    assert len(result.modules) - len(experts) == layers
    assert all(module.change > 0 for module in experts)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["target_parameters"]
    mapconv.merge(tmp_path / "out", tmp_path / "merged", base=base)
    wanted, merged = (tiny.load(folder).eval() for folder in (tuned, tmp_path / "merged"))
    stock = PeftModel.from_pretrained(tiny.load(base).eval(), str(tmp_path / "out"))
    inputs = tiny.inputs()
    with torch.no_grad():
        logits = [model(**inputs).logits for model in (wanted, merged, stock)]
    assert torch.allclose(logits[0], logits[1], atol=1e-4)
    assert torch.allclose(logits[0], logits[2], atol=1e-4)
    with torch.no_grad():
        assert not torch.allclose(logits[0], tiny.load(base).eval()(**inputs).logits, atol=1e-3)


def test_names_of_stacks(tmp_path: Path) -> None:
    base, tuned = pair(MODELS["mixtral"], tmp_path)
    left = mapconv.extract(tuned, tmp_path / "a", base=base, exclude="experts", rank=2)
    assert {module.path.rpartition(".")[2] for module in left.modules} == {"q_proj"}
    assert left.left == 4
    one = mapconv.extract(tuned, tmp_path / "b", base=base, targets="experts.down_proj", rank=2)
    assert {module.path.rpartition(".")[2] for module in one.modules} == {"experts"}
    assert len(one.modules) == 6
    assert any("a stack of experts" in note for note in one.notes)
    within = mapconv.extract(tuned, tmp_path / "c", base=base, targets="experts", tolerance=0.5)
    assert within.worst_error <= 0.5


def test_dora_has_no_stacks(tmp_path: Path) -> None:
    base, tuned = pair(MODELS["mixtral"], tmp_path)
    with pytest.raises(UnsupportedError, match=r"leave it to the base with --exclude"):
        mapconv.extract(tuned, tmp_path / "out", base=base, direction="dora")
    result = mapconv.extract(tuned, tmp_path / "out", base=base, direction="dora", exclude="experts")
    assert {module.direction for module in result.modules} == {"dora"}
    assert any("left to the base unseen" in note for note in result.notes)
