"""Sizes and layer roles that several of the tiny models share."""

from __future__ import annotations

from .tiny import HIDDEN, VOCAB, WIDE

DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDE,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
#: A square layer and an oblong one; that its neighbours are told apart, the cases of "all-linear" see.
DECODER_ROLES = {
    "linear": ("q_proj", "down_proj"),
    "embedding": ("embed_tokens",),
    "head": ("lm_head",),
}
EXPERT_ROLES = DECODER_ROLES | {"linear": ("q_proj", "v_proj"), "experts": ("gate_up_proj", "down_proj")}
BERT = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDE,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
}
BERT_ROLES = {
    "linear": ("query", "intermediate.dense"),
    "biased": ("query", "intermediate.dense"),
    "embedding": ("word_embeddings",),
}
GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": HIDDEN,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2_ROLES = {"conv1d_transposed": ("c_attn", "mlp.c_proj"), "biased": ("c_attn",), "embedding": ("wte",)}
VISION_TEXT = {key: value for key, value in DECODER.items() if key not in ("bos_token_id", "eos_token_id")}
