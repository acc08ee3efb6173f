"""LoRA files of llama.cpp: its names, its order of rows, its one alpha."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mapconv
from mapconv.errors import AdapterError, PlacementError

gguf = pytest.importorskip("gguf")
HEADS, KEYS, WIDTH, RANK, ALPHA = 4, 2, 16, 3, 6.0
SHAPES = {
    "model.layers.0.self_attn.q_proj": ("blk.0.attn_q", (16, WIDTH)),
    "model.layers.0.self_attn.k_proj": ("blk.0.attn_k", (8, WIDTH)),
    "model.layers.0.self_attn.v_proj": ("blk.0.attn_v", (8, WIDTH)),
    "model.layers.0.mlp.down_proj": ("blk.0.ffn_down", (WIDTH, 12)),
}


@pytest.fixture
def base(tmp_path) -> Path:
    (tmp_path / "base").mkdir()
    generator = torch.Generator().manual_seed(1)
    tensors = {f"{path}.weight": torch.randn(shape, generator=generator) for path, (_, shape) in SHAPES.items()}
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    config = {"architectures": ["SomeForCausalLM"], "num_attention_heads": HEADS, "num_key_value_heads": KEYS}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    return tmp_path / "base"


def written(file: Path, base: Path, alpha: float | None = ALPHA, kind: str = "adapter") -> dict[str, torch.Tensor]:
    """The file, as llama.cpp's converter orders it, and the weights that it makes."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_type(kind)
    writer.add_string("adapter.type", "lora")
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    generator = torch.Generator().manual_seed(2)
    weights, wanted = load_file(base / "model.safetensors"), {}
    for path, (name, (height, width)) in SHAPES.items():
        A, B = torch.randn(RANK, width, generator=generator), torch.randn(height, RANK, generator=generator)
        scale = alpha / RANK if alpha else 1.0
        wanted[f"{path}.weight"] = weights[f"{path}.weight"].double() + scale * B.double() @ A.double()
        if name.endswith(("attn_q", "attn_k")):
            heads = HEADS if name.endswith("q") else KEYS
            B = B.view(heads, 2, height // heads // 2, RANK).transpose(1, 2).reshape(height, RANK)
        writer.add_tensor(f"{name}.weight.lora_a", A.numpy())
        writer.add_tensor(f"{name}.weight.lora_b", B.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return wanted


@pytest.mark.parametrize("alpha", [ALPHA, 0.0, None])
def test_merged_and_upgraded(alpha, base, tmp_path):
    wanted = written(tmp_path / "style.gguf", base, alpha)
    assert mapconv.inspect(tmp_path / "style.gguf").dialect == "llama.cpp (GGUF)"
    mapconv.merge(tmp_path / "style.gguf", tmp_path / "merged", base=base)
    result = mapconv.upgrade(tmp_path / "style.gguf", base=base)
    assert result.out == tmp_path / "style-map"
    mapconv.merge(result.out, tmp_path / "again", base=base)
    for folder in ("merged", "again"):
        merged = load_file(tmp_path / folder / "model.safetensors")
        for name, tensor in wanted.items():
            torch.testing.assert_close(merged[name].double(), tensor, rtol=1e-5, atol=1e-5)


def test_another_number_of_heads(base, tmp_path):
    written(tmp_path / "style.gguf", base)
    (base / "config.json").write_text(json.dumps({"architectures": ["SomeForCausalLM"], "num_attention_heads": 5}))
    with pytest.raises(PlacementError, match="says that there are 5"):
        mapconv.merge(tmp_path / "style.gguf", tmp_path / "merged", base=base)


def test_a_model_is_no_adapter(base, tmp_path):
    written(tmp_path / "style.gguf", base, kind="model")
    with pytest.raises(AdapterError, match="expected an adapter"):
        mapconv.inspect(tmp_path / "style.gguf")
