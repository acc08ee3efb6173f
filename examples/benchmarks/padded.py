"""A Llama and its LoRA padded with zeros, so that every side is a whole number of FP8 blocks: the same function.

    python examples/benchmarks/padded.py BASE LORA OUT

transformers derives the size of a block from a weight's shape, which SmolLM2-135M's 576 columns do not divide into.
Writes OUT/base and OUT/lora. Heads of zeros add nothing; a norm over wider vectors is scaled back by its weight.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

BLOCK = 128


def padded(tensor: torch.Tensor, *shape: int) -> torch.Tensor:
    wide = torch.zeros(shape, dtype=tensor.dtype)
    wide[tuple(slice(size) for size in tensor.shape)] = tensor
    return wide


def main(base: Path, lora: Path, out: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, shared = config["num_attention_heads"], config["num_key_value_heads"]
    width, group = hidden // heads, heads // shared
    # As many groups of heads as fill whole blocks, in the keys as in the queries.
    while shared * width % BLOCK or shared * group * width % BLOCK:
        shared += 1
    wide, keys = shared * group * width, shared * width
    inner = BLOCK * math.ceil(inner / BLOCK)
    shapes = {
        "q_proj": (wide, wide), "k_proj": (keys, wide), "v_proj": (keys, wide), "o_proj": (wide, wide),
        "gate_proj": (inner, wide), "up_proj": (inner, wide), "down_proj": (wide, inner),
    }  # fmt: skip
    tensors = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        kind = name.split(".")[-2]
        if kind in shapes:
            tensors[name] = padded(tensor, *shapes[kind])
        elif tensor.ndim == 1:
            tensors[name] = padded((tensor.float() * math.sqrt(hidden / wide)).to(tensor.dtype), wide)
        else:
            tensors[name] = padded(tensor, len(tensor), wide)
    factors = {}
    for name, tensor in load_file(lora / "adapter_model.safetensors").items():
        rows, columns = shapes[name.split(".")[-3]]
        shape = (len(tensor), columns) if "lora_A" in name else (rows, tensor.shape[1])
        factors[name] = padded(tensor, *shape)
    config |= {"hidden_size": wide, "intermediate_size": inner, "head_dim": width}
    config |= {"num_attention_heads": shared * group, "num_key_value_heads": shared}
    config["rms_norm_eps"] *= hidden / wide
    for name, state in (("base/model", tensors), ("lora/adapter_model", factors)):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        save_file(state, out / f"{name}.safetensors", metadata={"format": "pt"})
    (out / "base" / "config.json").write_text(json.dumps(config))
    for file in base.glob("*token*"):
        shutil.copy(file, out / "base")
    adapter = json.loads((lora / "adapter_config.json").read_text())
    adapter["base_model_name_or_path"] = str(out / "base")
    (out / "lora" / "adapter_config.json").write_text(json.dumps(adapter))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
