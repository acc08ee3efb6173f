"""Random models and adapters in the shape of Llama-3.2-1B, for the benchmarks beside this file."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, INTERMEDIATE, KV, VOCAB = 2048, 8192, 512, 128256
SHARD_BYTES = 700_000_000
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}


def write_model(folder: Path, layers: int = 16) -> Path:
    """A bfloat16 checkpoint of ``layers`` layers (16: 1.24 billion parameters) in shards of 700 MB."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}{name}.weight": shape for name, shape in LINEARS.items()}
        shapes |= {f"{prefix}{name}.weight": (HIDDEN,) for name in ("input_layernorm", "post_attention_layernorm")}
    shapes["model.norm.weight"] = (HIDDEN,)
    shards, size = [[]], 0
    for name, shape in shapes.items():
        nbytes = 2 * torch.Size(shape).numel()
        if size + nbytes > SHARD_BYTES and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        tensors = {name: (torch.randn(shapes[name]) * 0.02).bfloat16() for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": sum(2 * torch.Size(s).numel() for s in shapes.values())},
        "weight_map": weight_map,
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "head_dim": 64,
        "intermediate_size": INTERMEDIATE, "num_hidden_layers": layers, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": VOCAB, "tie_word_embeddings": True, "dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_adapter(folder: Path, base: Path, *, use_dora: bool, layers: int = 16, rank: int = 16) -> Path:
    """A random adapter on all seven linears, in float32, in the format that PEFT saves."""
    if (folder / "adapter_config.json").exists():
        return folder
    folder.mkdir(parents=True)
    torch.manual_seed(1)
    tensors = {}
    for layer in range(layers):
        for name, (height, width) in LINEARS.items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(rank, width) / width**0.5
            tensors[f"{key}.lora_B.weight"] = torch.randn(height, rank) * 0.02
            if use_dora:
                scatter = 1.01 + 0.02 * torch.randn(height)
                tensors[f"{key}.lora_magnitude_vector"] = 0.02 * width**0.5 * scatter
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base.resolve()), "r": rank,
        "lora_alpha": rank, "use_dora": use_dora, "bias": "none", "inference_mode": True,
        "target_modules": [name.partition(".")[2] for name in LINEARS],
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
