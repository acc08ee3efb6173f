"""A model's ``config.json`` from a GGUF file's metadata: sizes, positions and tokens, as transformers names them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mapconv.checkpoint.gguf.families import Family, family_of
from mapconv.checkpoint.gguf.header import GgufFile
from mapconv.checkpoint.gguf.positions import rope_parameters
from mapconv.checkpoint.gguf.settings import Settings
from mapconv.errors import CheckpointError, UnsupportedError

_TOKENS = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}


def sizes_of(file: GgufFile) -> dict[str, Any]:
    """What of a configuration must be the file's own for the two to belong together.

    Raises:
        CheckpointError: a size that is missing or of another type.
    """
    settings = Settings(file)
    heads, hidden = settings.count("attention.head_count"), settings.count("embedding_length")
    if not heads or not hidden:
        raise CheckpointError(f"{file.path} describes a model without heads or without a width: download it again.")
    return {
        "model_type": family_of(file).model_type,
        "hidden_size": hidden,
        "intermediate_size": settings.count("feed_forward_length"),
        "num_hidden_layers": settings.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": settings.count("attention.head_count_kv", heads),
    }


def config_of(file: GgufFile, names: Mapping[str, tuple[int, ...]], dtype: str) -> dict[str, Any]:
    """The configuration of the model in a file.

    Args:
        file: its header.
        names: the shapes of its tensors, by GGUF's names (of all parts of a split file).
        dtype: what its weights are written as, in a configuration's words.

    Raises:
        CheckpointError: a setting that is missing or of another type. UnsupportedError: what the family's class in
            transformers cannot express.
    """
    family, settings, sizes = family_of(file), Settings(file), sizes_of(file)
    if "token_embd.weight" not in names:
        raise CheckpointError(f"{file.path} has no token_embd.weight: it is not a whole model.")
    head_dim = sizes["hidden_size"] // sizes["num_attention_heads"]
    if family.model_type != "phi3":  # whose rotary part may be smaller than a head
        head_dim = settings.count("attention.key_length", settings.count("rope.dimension_count", head_dim))
    config = sizes | {
        "architectures": [family.model_class],
        "dtype": dtype,
        "vocab_size": names["token_embd.weight"][0],
        "rms_norm_eps": settings.number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": settings.count("context_length"),
        # llama.cpp writes an output projection only where it is not the embedding.
        "tie_word_embeddings": "output.weight" not in names,
        "rope_parameters": rope_parameters(settings, family, head_dim),
    }
    if family.model_type not in ("qwen2", "phi3"):
        config["head_dim"] = head_dim
    if family.model_type in _OWN:
        config |= _OWN[family.model_type](settings, names, config)
    config |= _biases(file, family, names)
    for name, key in _TOKENS.items():
        token = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if type(token) is int and token < config["vocab_size"]:
            config[key] = token
    return config


def _biases(file: GgufFile, family: Family, names: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Which of its layers have biases, where the class leaves that to the configuration."""
    has = {part: f"blk.0.{part}.bias" in names for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_down")}
    attention = {has[part] for part in ("attn_q", "attn_k", "attn_v", "attn_output")}
    if family.model_type == "qwen2":
        return {}  # always, and on three of the four
    if attention == {True, False}:
        raise UnsupportedError(
            f"{file.path} has biases on some of its attention's layers, and {family.model_class} on all or none: give "
            "the 16-bit or 32-bit model with --base."
        )
    return {key: True for key, found in (("attention_bias", True in attention), ("mlp_bias", has["ffn_down"])) if found}


def _mixtral(settings: Settings, names: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_local_experts": settings.count("expert_count"),
        "num_experts_per_tok": settings.count("expert_used_count"),
        "sliding_window": None,
    }


def _qwen3_moe(settings: Settings, names: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_experts": settings.count("expert_count"),
        "num_experts_per_tok": settings.count("expert_used_count"),
        "moe_intermediate_size": settings.count("expert_feed_forward_length"),
        "norm_topk_prob": True,  # as llama.cpp computes
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],  # llama.cpp has no other
    }


def _gemma2(settings: Settings, names: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "sliding_window": settings.count("attention.sliding_window"),
        "attn_logit_softcapping": settings.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": settings.number("final_logit_softcapping", 30.0),
        "query_pre_attn_scalar": _query_scalar(config, largest=46),
    }


def _gemma3(settings: Settings, names: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    softcap = settings.number("final_logit_softcapping", 0.0)
    # Layers of a whole context come every sixth, which the file does not say (llama.cpp has it in its code too).
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    return {
        "sliding_window": settings.count("attention.sliding_window"),
        "layer_types": [kinds[layer % 6] for layer in range(config["num_hidden_layers"])],
        "query_pre_attn_scalar": _query_scalar(config, largest=62),
        "final_logit_softcapping": softcap or None,
    }


def _query_scalar(config: Mapping[str, Any], *, largest: int) -> int:
    """What queries are divided by the root of: a head's width, but in the family's largest model (by its layers)."""
    if config["num_hidden_layers"] == largest:
        return config["hidden_size"] // config["num_attention_heads"]
    return config["head_dim"]


def _phi3(settings: Settings, names: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "sliding_window": settings.count("attention.sliding_window", 0) or None,
        "original_max_position_embeddings": settings.count(
            "rope.scaling.original_context_length", config["max_position_embeddings"]
        ),
        "attention_dropout": 0.0,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        # The class's default lies beyond most vocabularies of this size.
        "pad_token_id": None,
    }


#: What only one class has, by model type.
_OWN = {
    "mixtral": _mixtral, "qwen3_moe": _qwen3_moe, "gemma2": _gemma2, "gemma3_text": _gemma3, "phi3": _phi3,
}  # fmt: skip
