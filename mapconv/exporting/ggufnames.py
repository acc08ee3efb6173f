"""What llama.cpp calls the modules of a language model, and how it stores them beside transformers.

Architectures and names are those of ``gguf``'s tables; which of them interleave the two halves of each head's rows in
q and k is ``convert_hf_to_gguf.py``'s (every class that inherits from its Llama's, and OLMo's).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from mapconv.checkpoint.gguf.families import FAMILIES, MIXTURES
from mapconv.checkpoint.model_config import read_model_config
from mapconv.errors import CheckpointError
from mapconv.placement.adapters import PlacedAdapter
from mapconv.untrusted.schema import shown

#: transformers' model type → (llama.cpp's architecture, whether the rows of q and k are interleaved): those that
#: mapconv reads the models of, and further ones with the same names.
ARCHITECTURES = {family.model_type: (name, family.interleaved) for name, family in FAMILIES.items()} | {
    "mistral": ("llama", True),
    "mixtral": ("llama", True),
    "smollm3": ("smollm3", True),
    "granite": ("granite", True),
    "minicpm": ("minicpm", True),
    "arcee": ("arcee", True),
    "olmo": ("olmo", True),
    "olmo2": ("olmo2", False),
    "starcoder2": ("starcoder2", False),
    "stablelm": ("stablelm", False),
    "cohere": ("command-r", False),
}
_LAYERS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
_OUTSIDE = {"model.embed_tokens": "token_embd", "lm_head": "output"}
#: Of each model type with experts: what one's matrix is called in its layer, its number replaced by a star, in a stack.
_EXPERTS = {
    family.model_type: {path: f"{name}.weight" for name, path in family.experts.items()} for family in MIXTURES.values()
}
_NUMBER = re.compile(r"(?<=\.experts\.)[0-9]+(?=\.)")
_IN_LAYER = re.compile(r"model\.layers\.(?P<layer>\d{1,6})\.(?P<name>.+)")


def gguf_name(path: str, config: Mapping[str, Any]) -> str | None:
    """``blk.0.attn_q.weight`` for ``model.layers.0.self_attn.q_proj``; None where llama.cpp has no such tensor.

    The experts of a layer have one name together, ``blk.0.ffn_up_exps.weight``: they are one tensor there. A head that
    is tied to the embeddings is one of those: the file of such a model has no output matrix.
    """
    if config.get("model_type") not in ARCHITECTURES or (path == "lm_head" and config.get("tie_word_embeddings")):
        return None
    match = _IN_LAYER.fullmatch(path)
    if match is None:
        return None if path not in _OUTSIDE else f"{_OUTSIDE[path]}.weight"
    layer, experts = f"blk.{int(match['layer'])}.", _EXPERTS.get(str(config["model_type"]), {})
    stack = experts.get(_NUMBER.sub("*", match["name"]))
    if stack is not None:
        return layer + stack
    name = _LAYERS.get(match["name"])
    return None if name is None else f"{layer}{name}.weight"


def layer_of(path: str) -> int:
    """The layer that a module lies in."""
    match = _IN_LAYER.fullmatch(path)
    assert match is not None  # a module that has a name within a layer
    return int(match["layer"])


def gguf_config(placed: PlacedAdapter) -> dict[str, Any]:
    """The base's configuration; empty where it has none, for which llama.cpp has no architecture."""
    try:
        return read_model_config(placed.target.folder)
    except FileNotFoundError:
        return {}


def has_expert_stacks(config: Mapping[str, Any]) -> bool:
    """Whether llama.cpp's names for the experts of such a model are known."""
    return config.get("model_type") in _EXPERTS


def heads_of(name: str, rows: int, config: Mapping[str, Any]) -> int | None:
    """The heads whose rows are interleaved in this tensor, or None where its rows are as transformers has them.

    Raises:
        CheckpointError: a number of heads that the rows cannot have.
    """
    if not ARCHITECTURES[str(config.get("model_type"))][1]:
        return None
    if not name.endswith(("attn_q.weight", "attn_k.weight")):
        return None
    heads = config.get("num_attention_heads")
    heads = config.get("num_key_value_heads") or heads if name.endswith("attn_k.weight") else heads
    if type(heads) is not int or heads < 1 or rows % (2 * heads):
        raise CheckpointError(
            f"the base's config.json says {shown(heads)} attention heads, which {rows} rows of {name} do not make: "
            "correct it."
        )
    return heads


def interleaved(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows (heads·2·d, …) with the halves of each head interleaved: row i of a half becomes row 2·i, or 2·i + 1."""
    return rows.view(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
