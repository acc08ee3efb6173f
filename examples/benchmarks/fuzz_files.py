"""Sound files of every kind that mapconv reads, as small as they can be: what ``fuzz.py`` mutates."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

README = """---
license: apache-2.0
language: [en, de]
tags:
- map
- text-generation
base_model: owner/base
datasets:
- owner/data
date: 2023-02-01
model-index:
- name: x
  results: [{task: {type: text}, metrics: [{type: kl, value: 0.5}]}]
---

# A model

Words before.

<!-- mapconv:begin own=none (written again by each `mapconv push`: put your own text outside) -->

what mapconv wrote

<!-- mapconv:end -->

Words after.
"""
CATALOG = """defaults:
  base: base
  upgrade: {rank: 4, dtype: float32}
adapters:
- source: lora
  output: a
  verify: {samples: 4}
- source: owner/name@main
  base: owner/base
  output: b
  merge: true
  push: {repo_id: owner/b, private: true}
- {source: ./lora, output: c, upgrade: {dtype: float16}}
"""
LEDGER = (
    {"ledger": 1, "mapconv_version": "1.0"},
    {
        "entry": "a", "fingerprint": "f", "status": "done", "source": "lora", "base": "base", "output": "a",
        "method": "LoRA", "rank": 4, "modules": 2, "worst_error": 0.1, "median_error": 0.05, "parameters": 100,
        "nbytes": 400, "kl": 0.01, "seconds": 1.5, "attempts": 1, "finished": "2025-01-01T00:00:00", "stat": "s",
        "content": "c", "merged": None, "pushed": None, "stage": None, "kind": None, "error": None,
    },
    {"entry": "b", "fingerprint": "g", "status": "failed", "kind": "AdapterError", "error": "broken.",
        "stage": "upgrade"},
)  # fmt: skip
TEXTS = ({"text": "one text"}, {"text": "another", "source": "x"}, {"text": "a third"})
CHATS = (
    {
        "messages": [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
        ]
    },
    {"messages": [{"role": "user", "content": None}], "tools": [{"type": "function"}]},
)


def write_base(folder: Path) -> Path:
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {f"model.layers.{n}.self_attn.q_proj.weight": torch.randn(8, 8, generator=generator) for n in range(2)}
    save_file(
        {**tensors, "model.embed_tokens.weight": torch.randn(20, 8, generator=generator)}, folder / "model.safetensors"
    )
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 20, "hidden_size": 8,
        "num_hidden_layers": 2, "dtype": "float32", "num_attention_heads": 2, "intermediate_size": 8, "rope_theta": 1e4,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_sharded(folder: Path) -> Path:
    folder.mkdir()
    save_file({"a": torch.ones(2)}, folder / "model-1.safetensors")
    save_file({"b": torch.ones(2)}, folder / "model-2.safetensors")
    index = {"metadata": {"total_size": 16}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_adapter(folder: Path, base: Path) -> Path:
    folder.mkdir()
    tensors = {}
    for number in range(2):
        prefix = f"base_model.model.model.layers.{number}.self_attn.q_proj"
        tensors |= {f"{prefix}.lora_A.weight": torch.ones(2, 8), f"{prefix}.lora_B.weight": torch.ones(8, 2)}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "r": 2, "lora_alpha": 4,
        "target_modules": ["q_proj"], "rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {},
        "bias": "none",
        "use_dora": False, "use_rslora": False, "modules_to_save": None, "init_lora_weights": True, "revision": None,
        "layer_replication": None, "trainable_token_indices": None, "target_parameters": None, "peft_version": "0.21.0",
        "exclude_modules": None, "layers_to_transform": None, "layers_pattern": None, "fan_in_fan_out": False,
        "auto_mapping": None, "loftq_config": {}, "inference_mode": True, "lora_dropout": 0.1,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
