"""The models whose GGUF tensors are known: what transformers calls each, and how llama.cpp's converter changed it.

Facts: llama.cpp, conversion/{llama,qwen,gemma,phi}.py and gguf-py's tensor_mapping.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from mapconv.checkpoint.gguf.header import SETTING_TENSORS, GgufFile, GgufTensor
from mapconv.errors import CheckpointError, UnsupportedError

_BLOCK = re.compile(r"blk\.([0-9]{1,5})\.(.+)\.(weight|bias)")
_ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
}  # fmt: skip
_GATED = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_LLAMA = {**_ATTENTION, **_GATED, "ffn_norm": "post_attention_layernorm"}
_GEMMA2 = {
    **_ATTENTION, **_GATED, "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
#: Stacks of experts, by what the names of one expert's matrices are in a checkpoint of one tensor each.
_MIXTRAL_EXPERTS = {
    f"ffn_{name}_exps": f"block_sparse_moe.experts.*.{w}" for name, w in (("gate", "w1"), ("down", "w2"), ("up", "w3"))
}
_QWEN_EXPERTS = {f"ffn_{name}_exps": f"mlp.experts.*.{name}_proj" for name in ("gate", "down", "up")}


@dataclass(frozen=True)
class Family:
    """One architecture.

    ``layer`` maps the names in a block, ``experts`` those of stacks, whose star is the expert's number. In an
    ``interleaved`` model the rows of each head of q and k stand as (half, 2) instead of (2, half). ``norm_offset`` is
    what the converter added to norms.
    """

    model_type: str
    model_class: str
    layer: Mapping[str, str]
    experts: Mapping[str, str] = field(default_factory=dict)
    interleaved: bool = False
    norm_offset: float = 0.0


_LLAMA_FAMILY = Family("llama", "LlamaForCausalLM", _LLAMA, interleaved=True)
_MIXTRAL = Family(
    "mixtral", "MixtralForCausalLM", {**_LLAMA, "ffn_gate_inp": "block_sparse_moe.gate"}, _MIXTRAL_EXPERTS,
    interleaved=True,
)  # fmt: skip
FAMILIES = {
    "llama": _LLAMA_FAMILY,
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", _LLAMA),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", {**_LLAMA, **_HEAD_NORMS}),
    "qwen3moe": Family(
        "qwen3_moe", "Qwen3MoeForCausalLM", {**_LLAMA, **_HEAD_NORMS, "ffn_gate_inp": "mlp.gate"}, _QWEN_EXPERTS
    ),
    "gemma": Family("gemma", "GemmaForCausalLM", _LLAMA, norm_offset=1.0),
    "gemma2": Family("gemma2", "Gemma2ForCausalLM", _GEMMA2, norm_offset=1.0),
    "gemma3": Family("gemma3_text", "Gemma3ForCausalLM", {**_GEMMA2, **_HEAD_NORMS}, norm_offset=1.0),
    "phi3": Family(
        "phi3",
        "Phi3ForCausalLM",
        {**_LLAMA, "attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
    ),
}


#: Those whose experts are stacks, by llama.cpp's architecture, which may be that of a model without experts as well.
MIXTURES = {name: family for name, family in FAMILIES.items() if family.experts} | {"llama": _MIXTRAL}


def family_of(file: GgufFile) -> Family:
    """The family of a file.

    Raises:
        UnsupportedError: an architecture that is not known here. CheckpointError: no model of text at all.
    """
    architecture = file.metadata.get("general.architecture")
    if file.metadata.get("general.type", "model") != "model":
        raise CheckpointError(
            f"{file.path} holds {file.metadata['general.type']!r}, expected a model: give the base model with --base."
        )
    family = FAMILIES.get(architecture) if isinstance(architecture, str) else None
    if family is None:
        raise UnsupportedError(
            f"{file.path} is a GGUF of the architecture {architecture!r}, and mapconv knows {', '.join(FAMILIES)}: "
            "give the 16-bit or 32-bit model with --base."
        )
    if file.metadata.get(f"{architecture}.expert_count"):
        return MIXTURES.get(str(architecture), family)
    return family


@dataclass(frozen=True)
class NamedTensor:
    """A stored tensor, or one matrix of a stack, by the name that transformers has for it.

    ``heads``: "q" or "k" where its rows are interleaved by heads. ``offset``: what was added to its values.
    """

    name: str
    stored: GgufTensor
    expert: int | None = None
    heads: str | None = None
    offset: float = 0.0


def named_tensors(file: GgufFile, tensors: tuple[GgufTensor, ...]) -> Iterator[NamedTensor]:
    """Every weight of some tensors of a model whose header is ``file``'s, in the order of their bytes.

    Raises:
        UnsupportedError: a tensor that no model of this family has.
    """
    family = family_of(file)
    for tensor in tensors:
        if tensor.name in SETTING_TENSORS:
            continue
        end, _, kind = tensor.name.rpartition(".")
        if end in _ENDS:
            yield NamedTensor(f"{_ENDS[end]}.{kind}", tensor, offset=family.norm_offset if "norm" in end else 0.0)
            continue
        match = _BLOCK.fullmatch(tensor.name)
        layer, part, kind = match.groups() if match else ("", "", "")
        if part in family.experts and kind == "weight" and len(tensor.shape) == 3:
            path = f"model.layers.{layer}.{family.experts[part]}.weight"
            for expert in range(tensor.shape[0]):
                yield NamedTensor(path.replace("*", str(expert)), tensor, expert)
            continue
        if part not in family.layer:
            raise UnsupportedError(
                f"{file.path}: {tensor.name} is not a tensor of {family.model_class} as mapconv knows it: give the "
                "16-bit or 32-bit model with --base."
            )
        yield NamedTensor(
            f"model.layers.{layer}.{family.layer[part]}.{kind}",
            tensor,
            heads=part[-1] if family.interleaved and part in ("attn_q", "attn_k") else None,
            offset=family.norm_offset if part.endswith("norm") else 0.0,
        )
