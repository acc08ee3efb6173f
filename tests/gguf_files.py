"""Tiny GGUF files as llama.cpp's converter writes them: names, order of rows, what it adds to norms, metadata."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

#: Type numbers.
F32, F16, Q8_0, BF16 = 0, 1, 8, 30
_FORMATS = {bool: (7, "?"), int: (4, "I"), float: (6, "f")}
Blocks = tuple[tuple[int, ...], int, bytes]

_COMMON = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
}  # fmt: skip
_FOUR_NORMS = {
    "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip
#: What differs from the common names, by architecture.
NAMES = {
    "llama": {"block_sparse_moe.gate": "ffn_gate_inp"},
    "qwen2": {},
    "qwen3": {},
    "qwen3moe": {"mlp.gate": "ffn_gate_inp"},
    "gemma": {},
    "gemma2": _FOUR_NORMS,
    "gemma3": _FOUR_NORMS,
    "phi3": {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"},
}
_EXPERTS = {
    "w1": "ffn_gate_exps", "w2": "ffn_down_exps", "w3": "ffn_up_exps",
    "gate_proj": "ffn_gate_exps", "down_proj": "ffn_down_exps", "up_proj": "ffn_up_exps",
}  # fmt: skip


def write_gguf(path: Path, settings: Mapping[str, Any], tensors: Mapping[str, Blocks], *, version: int = 3) -> Path:
    """A GGUF file of these settings and tensors; a tensor is (shape, type number, bytes)."""
    header = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(settings))
    for key, value in settings.items():
        header += _text(key) + _value(value)
    data = b""
    for name, (shape, kind, content) in tensors.items():
        header += _text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        header += struct.pack("<IQ", kind, len(data))
        data += content + b"\0" * (-len(content) % 32)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + b"\0" * (-len(header) % 32) + data)
    return path


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def _value(value: Any) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    if isinstance(value, list):
        kind, items = (8, map(_text, value)) if isinstance(value[0], str) else (_FORMATS[type(value[0])][0], None)
        if items is None:
            items = (struct.pack(f"<{_FORMATS[type(item)][1]}", item) for item in value)
        return struct.pack("<IIQ", 9, kind, len(value)) + b"".join(items)
    number, code = _FORMATS[type(value)]
    return struct.pack(f"<I{code}", number, value)


def floats(tensor: torch.Tensor) -> Blocks:
    return tuple(tensor.shape), F32, tensor.float().numpy().tobytes()


def q8_0(weight: torch.Tensor) -> tuple[Blocks, torch.Tensor]:
    """(blocks, the values that they stand for) of a weight whose rows are whole blocks."""
    groups = weight.float().view(-1, 32)
    scales = (groups.abs().amax(1, keepdim=True) / 127).half()
    codes = (groups / scales.float()).round().clamp(-127, 127).to(torch.int8)
    content = torch.cat([scales.view(torch.uint8).view(-1, 2), codes.view(torch.uint8)], 1)
    values = (codes.float() * scales.float()).view(weight.shape)
    return (tuple(weight.shape), Q8_0, content.numpy().tobytes()), values


def as_converted(architecture: str, name: str, tensor: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    """A tensor as the converter turns it: q and k of a Llama by heads, the norms of a Gemma plus one."""
    if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
        heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
        return tensor.view(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
    return tensor + 1 if architecture.startswith("gemma") and "norm" in name else tensor


def gguf_name(architecture: str, name: str) -> str:
    """llama.cpp's name of one of transformers' tensors, a whole stack's for an expert's."""
    names = {**_COMMON, **NAMES[architecture]}
    path, _, kind = name.rpartition(".")
    if path in names:
        return f"{names[path]}.{kind}"
    _, _, layer, part = path.split(".", 3)
    if ".experts." in part:
        return f"blk.{layer}.{_EXPERTS[part.rpartition('.')[2]]}.{kind}"
    return f"blk.{layer}.{names[part]}.{kind}"


def settings_of(architecture: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata that the converter writes for every model, and a word of its vocabulary."""
    values = {
        "context_length": config["max_position_embeddings"], "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"], "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
    }  # fmt: skip
    if config.get("head_dim"):
        values |= {"attention.key_length": config["head_dim"], "attention.value_length": config["head_dim"]}
    tokens = {"bos": 1, "eos": 2}
    return {
        "general.architecture": architecture,
        "general.name": "tiny",
        **{f"{architecture}.{key}": value for key, value in values.items()},
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [f"token {number}" for number in range(config["vocab_size"])],
        **{f"tokenizer.ggml.{name}_token_id": number for name, number in tokens.items()},
    }


def save_gguf(
    model: Path,
    path: Path,
    architecture: str = "llama",
    *,
    quantized: bool = True,
    extra: Mapping[str, torch.Tensor] | None = None,
    **settings: Any,
) -> dict[str, torch.Tensor]:
    """Write the model in a folder as GGUF, matrices in Q8_0 or all in float32; returns the values by its own names."""
    config = json.loads((model / "config.json").read_text())
    tensors: dict[str, Blocks] = {}
    stacks: dict[str, list[torch.Tensor]] = {}
    values = {}
    for name, tensor in sorted(load_file(model / "model.safetensors").items(), key=lambda item: _numbers(item[0])):
        turned = as_converted(architecture, name, tensor.float(), config)
        target = gguf_name(architecture, name)
        if ".experts." in name:
            stacks.setdefault(target, []).append(turned)
            values[name] = tensor.float()
        elif quantized and tensor.ndim == 2:
            tensors[target], decoded = q8_0(turned)
            # The permutation is of whole rows, so blocks of the original hold the same numbers.
            values[name] = q8_0(tensor.float())[1]
            assert decoded.shape == values[name].shape
        else:
            tensors[target], values[name] = floats(turned), tensor.float()
    tensors |= {name: floats(torch.stack(parts)) for name, parts in stacks.items()}
    tensors |= {name: floats(tensor) for name, tensor in (extra or {}).items()}
    write_gguf(path, settings_of(architecture, config) | settings, tensors)
    return values


def _numbers(name: str) -> list[Any]:
    """Sorts experts by their number."""
    return [f"{int(part):06d}" if part.isdigit() else part for part in name.split(".")]
