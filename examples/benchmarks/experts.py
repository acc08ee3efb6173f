"""Merge a LoRA on one stacked expert tensor of 2 GB: memory must follow a row block, not the tensor.

    python examples/benchmarks/experts.py /tmp/bench

The peak includes torch and transformers themselves, which this kind of adapter needs to be placed; it is printed too.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from measure import mapconv, python
from safetensors.torch import save_file

EXPERTS, WIDTH, HIDDEN, RANK = 128, 2048, 2048, 16
START_UP = "import transformers, mapconv.commands.merge; from transformers import Qwen3MoeForCausalLM"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    base, adapter = write_base(folder / "experts-base"), write_adapter(folder / "experts-lora")
    shutil.rmtree(folder / "out", ignore_errors=True)
    start_up = python(START_UP)
    merged = mapconv("merge", adapter, "--base", base, "-o", folder / "out", "-q")
    print(f"start-up (imports alone): {start_up.seconds:.1f} s, {start_up.megabytes:.0f} MB")
    print(f"merge of a 2.1 GB tensor: {merged.seconds:.1f} s, peak {merged.megabytes:.0f} MB")


def write_base(folder: Path) -> Path:
    """A Qwen3-MoE of one layer in the layout of transformers 5, one of whose tensors has 2.1 GB."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True)
    shapes = {
        "model.embed_tokens.weight": (64, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (64, HIDDEN),
        "model.layers.0.input_layernorm.weight": (HIDDEN,),
        "model.layers.0.post_attention_layernorm.weight": (HIDDEN,),
        "model.layers.0.self_attn.q_norm.weight": (64,),
        "model.layers.0.self_attn.k_norm.weight": (64,),
        "model.layers.0.mlp.gate.weight": (EXPERTS, HIDDEN),
        "model.layers.0.mlp.experts.gate_up_proj": (EXPERTS, 2 * WIDTH, HIDDEN),
        "model.layers.0.mlp.experts.down_proj": (EXPERTS, HIDDEN, WIDTH),
    }
    shapes |= {f"model.layers.0.self_attn.{name}_proj.weight": (64, HIDDEN) for name in "qkv"}
    shapes["model.layers.0.self_attn.o_proj.weight"] = (HIDDEN, 64)
    torch.manual_seed(0)
    tensors = {name: torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": HIDDEN, "head_dim": 64,
        "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": 64,
        "moe_intermediate_size": WIDTH, "intermediate_size": WIDTH, "num_experts": EXPERTS, "num_experts_per_tok": 8,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "tie_word_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_adapter(folder: Path) -> Path:
    """LoRA factors for every expert's gate and up projection."""
    if (folder / "adapter_config.json").exists():
        return folder
    folder.mkdir(parents=True)
    key = "base_model.model.model.layers.0.mlp.experts"
    tensors = {
        f"{key}.lora_A.weight": torch.randn(EXPERTS * RANK, HIDDEN) / HIDDEN**0.5,
        f"{key}.lora_B.weight": torch.randn(2 * WIDTH, EXPERTS * RANK) * 0.02,
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK, "target_modules": [],
        "target_parameters": ["experts.gate_up_proj"],
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


if __name__ == "__main__":
    main()
