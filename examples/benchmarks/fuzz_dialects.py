"""Sound adapters of other programs than PEFT, as small as they can be: what ``fuzz.py`` mutates."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file

_LAYER = "model.layers.0.self_attn.q_proj"


def write_mlx(folder: Path) -> Path:
    folder.mkdir()
    tensors = {f"{_LAYER}.lora_a": torch.ones(8, 2), f"{_LAYER}.lora_b": torch.ones(2, 8)}
    switch = "model.layers.0.mlp.switch_mlp.up_proj"
    tensors |= {f"{switch}.lora_a": torch.ones(3, 2, 8), f"{switch}.lora_b": torch.ones(3, 4, 2)}
    save_file(tensors, folder / "adapters.safetensors")
    config = {
        "model": "owner/base", "fine_tune_type": "lora", "num_layers": 1,
        "lora_parameters": {"rank": 2, "scale": 20.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]},
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def write_gguf_lora(file: Path) -> Path:
    """Two tensors of float32, under one key of each kind that the reader looks at."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    keys = [("general.architecture", "llama"), ("general.type", "adapter"), ("adapter.type", "lora")]
    header = b"".join(text(name) + struct.pack("<I", 8) + text(value) for name, value in keys)
    header += text("adapter.lora.alpha") + struct.pack("<If", 6, 4.0)
    shapes = {"blk.0.attn_v.weight.lora_a": (2, 8), "blk.0.attn_v.weight.lora_b": (8, 2)}
    tensors, offset = b"", 0
    for name, (rows, columns) in shapes.items():
        tensors += text(name) + struct.pack("<IQQIQ", 2, columns, rows, 0, offset)
        offset += 64
    content = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), len(keys) + 1) + header + tensors
    file.write_bytes(content + b"\0" * (-len(content) % 32) + struct.pack("<f", 1.0) * 32)
    return file


def write_tinker(folder: Path) -> Path:
    folder.mkdir()
    path = "base_model.model.model.layers.0.mlp.experts"
    tensors = {f"{path}.w1.lora_A.weight": torch.ones(1, 2, 8), f"{path}.w1.lora_B.weight": torch.ones(3, 4, 2)}
    tensors |= {f"{path}.w2.lora_A.weight": torch.ones(3, 2, 4), f"{path}.w2.lora_B.weight": torch.ones(1, 8, 2)}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": "all-linear"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def write_image(file: Path) -> Path:
    """The keys of several trainers, of which each kind occurs."""
    key = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {f"{key}.lora_down.weight": torch.ones(2, 8), f"{key}.lora_up.weight": torch.ones(8, 2)}
    tensors |= {f"{key}.alpha": torch.tensor(1.0), f"{key}.dora_scale": torch.ones(8, 1)}
    other = "lora_unet_mid_block_resnets_0_conv1"
    tensors |= {f"{other}.hada_w{n}_{part}": torch.ones(4, 4) for n in (1, 2) for part in "ab"}
    save_file(tensors, file, metadata={"ss_network_module": "lycoris.kohya"})
    return file


def write_torchtune(folder: Path) -> Path:
    folder = folder / "torchtune"
    folder.mkdir()
    path = "layers.0.attn.q_proj"
    torch.save(
        {f"{path}.lora_a.weight": torch.ones(2, 8), f"{path}.lora_b.weight": torch.ones(8, 2)},
        folder / "adapter_0.pt",
    )
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4, "peft_type": "LORA"}))
    return folder


def write_litgpt(folder: Path) -> Path:
    folder = folder / "litgpt"
    folder.mkdir()
    path = "transformer.h.0.attn.qkv"
    state = {f"{path}.lora_A": torch.ones(6, 8), f"{path}.lora_B": torch.ones(16, 2)}
    torch.save({"model": state}, folder / "lit_model.pth.lora")
    settings = {"lora_r": 2, "lora_alpha": 4, "lora_query": True, "lora_key": True, "lora_value": True}
    (folder / "hyperparameters.yaml").write_text(yaml.safe_dump(settings))
    model = {"n_head": 2, "n_query_groups": 1, "head_size": 4, "n_embd": 8, "mlp_class_name": "LLaMAMLP"}
    (folder / "model_config.yaml").write_text(yaml.safe_dump(model))
    return folder


def write_nemo(folder: Path) -> Path:
    folder = folder / "nemo"
    folder.mkdir()
    path = "model.decoder.layers.0.self_attention.adapter_layer.lora_kqv_adapter"
    state = {f"{path}.linear_in.weight": torch.ones(2, 8), f"{path}.linear_out.weight": torch.ones(16, 2)}
    torch.save(state, folder / "model_weights.ckpt")
    config = {"num_attention_heads": 2, "num_query_groups": 1, "hidden_size": 8, "kv_channels": 4}
    config |= {"activation": "swiglu", "peft": {"lora_tuning": {"adapter_dim": 2, "alpha": 4}}}
    (folder / "model_config.yaml").write_text(yaml.safe_dump(config))
    return folder
