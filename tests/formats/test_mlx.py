"""Adapters of MLX-LM, beside what its own layers fuse to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mapconv
from mapconv.errors import AdapterError

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
SHAPES = {Q: (6, 8), DOWN: (8, 12)}
SCALE, RANK = 20.0, 3


@pytest.fixture
def base(tmp_path) -> Path:
    (tmp_path / "base").mkdir()
    generator = torch.Generator().manual_seed(1)
    tensors = {f"{path}.weight": torch.randn(shape, generator=generator) for path, shape in SHAPES.items()}
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    return tmp_path / "base"


def written(folder: Path, base: Path, kind: str) -> dict[str, torch.Tensor]:
    """An adapter, and the weights that it makes by MLX-LM's formulas in float64."""
    generator = torch.Generator().manual_seed(2)
    weights = load_file(base / "model.safetensors")
    tensors, wanted = {}, {}
    for path, (height, width) in SHAPES.items():
        a = tensors[f"{path}.lora_a"] = torch.randn(width, RANK, generator=generator) * 0.1
        b = tensors[f"{path}.lora_b"] = torch.randn(RANK, height, generator=generator) * 0.1
        merged = weights[f"{path}.weight"].double() + SCALE * (a.double() @ b.double()).T
        if kind == "dora":
            m = tensors[f"{path}.m"] = torch.linspace(1, 2, height)
            merged = merged * (m.double() / merged.norm(dim=1))[:, None]
        wanted[f"{path}.weight"] = merged
    folder.mkdir()
    save_file(tensors, folder / "adapters.safetensors")
    parameters = {"rank": RANK, "scale": SCALE, "dropout": 0.0}
    config = {"fine_tune_type": kind, "num_layers": 1, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return wanted


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_merged_and_upgraded(kind, base, tmp_path):
    wanted = written(tmp_path / "mlx", base, kind)
    found = mapconv.inspect(tmp_path / "mlx", base=base)
    assert (found.dialect, found.method) == ("MLX-LM", {"lora": "LoRA", "dora": "DoRA"}[kind])
    mapconv.merge(tmp_path / "mlx", tmp_path / "merged", base=base)
    mapconv.upgrade(tmp_path / "mlx", tmp_path / "map", base=base, direction="dora")
    mapconv.merge(tmp_path / "map", tmp_path / "again", base=base)
    for folder in ("merged", "again"):
        merged = load_file(tmp_path / folder / "model.safetensors")
        for name, tensor in wanted.items():
            torch.testing.assert_close(merged[name].double(), tensor, rtol=1e-5, atol=1e-6)


def test_the_formulas_are_mlx_lm_s(base, tmp_path):
    mx = pytest.importorskip("mlx.core")
    nn = pytest.importorskip("mlx.nn")
    lora, dora = pytest.importorskip("mlx_lm.tuner.lora"), pytest.importorskip("mlx_lm.tuner.dora")
    for kind, layer in (("lora", lora.LoRALinear), ("dora", dora.DoRALinear)):
        wanted = written(tmp_path / kind, base, kind)
        tensors = load_file(tmp_path / kind / "adapters.safetensors")
        weights = load_file(base / "model.safetensors")
        for path, (height, width) in SHAPES.items():
            linear = nn.Linear(width, height, bias=False)
            linear.weight = mx.array(weights[f"{path}.weight"].numpy())
            adapted = layer.from_base(linear, r=RANK, scale=SCALE)
            parts = {name.rpartition(".")[2]: mx.array(t.numpy()) for name, t in tensors.items() if path in name}
            for name, value in parts.items():
                setattr(adapted, name, value)
            fused = torch.tensor(memoryview(adapted.fuse().weight).tolist()).double()
            torch.testing.assert_close(fused, wanted[f"{path}.weight"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_parameters": {"rank": 3}}, "has the scale null"),
        ({"lora_parameters": {"scale": True}}, "expected a number"),
        ({"lora_parameters": {"scale": 10**400}}, "expected a number"),
        ({"fine_tune_type": "ia3"}, "expected lora, dora or full"),
        ({"fine_tune_type": "dora"}, "expected lora_a, lora_b, m"),
    ],
)
def test_broken_configurations(change, message, base, tmp_path):
    written(tmp_path / "mlx", base, "lora")
    place = tmp_path / "mlx" / "adapter_config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | change))
    with pytest.raises(AdapterError, match=message):
        mapconv.inspect(tmp_path / "mlx")


def test_a_tensor_of_something_else(base, tmp_path):
    written(tmp_path / "mlx", base, "lora")
    file = tmp_path / "mlx" / "adapters.safetensors"
    save_file(load_file(file) | {"model.norm.weight": torch.ones(8)}, file)
    with pytest.raises(AdapterError, match=r"model\.norm\.weight is not a part of an MLX-LM LoRA"):
        mapconv.inspect(tmp_path / "mlx")
