"""The tiny random models of the matrix, one or more for each family."""

from __future__ import annotations

from typing import Any

from . import inputs
from .tiny import HIDDEN, VOCAB, WIDE, Tiny

_DECODER = {
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
_DECODER_ROLES = {
    "linear": ("q_proj", "v_proj", "down_proj"),
    "embedding": ("embed_tokens",),
    "head": ("lm_head",),
}
_EXPERT_ROLES = _DECODER_ROLES | {"linear": ("q_proj", "v_proj"), "experts": ("gate_up_proj", "down_proj")}
_BERT = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDE,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
}
_BERT_ROLES = {
    "linear": ("query", "value", "intermediate.dense"),
    "biased": ("query", "value", "intermediate.dense"),
    "embedding": ("word_embeddings",),
}
_GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": HIDDEN,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2_ROLES = {"conv1d_transposed": ("c_attn", "mlp.c_proj"), "biased": ("c_attn",), "embedding": ("wte",)}


def _decoder(name: str, family: str, *, layers: str = "layers", tied: bool = False, **settings: Any) -> Tiny:
    return Tiny(
        name=name,
        model_class=f"{family}ForCausalLM",
        config_class=settings.pop("config_class", f"{family}Config"),
        settings=_DECODER | {"tie_word_embeddings": tied} | settings,
        auto="AutoModelForCausalLM",
        inputs=inputs.text,
        roles=_DECODER_ROLES,
        tied=tied,
        layers=layers,
    )


def _experts(name: str, family: str, **settings: Any) -> Tiny:
    return Tiny(
        name=name,
        model_class=f"{family}ForCausalLM",
        config_class=f"{family}Config",
        settings=_DECODER | {"tie_word_embeddings": False, "num_experts_per_tok": 2} | settings,
        auto="AutoModelForCausalLM",
        inputs=inputs.text,
        roles=_EXPERT_ROLES,
        layers="layers",
    )


_VISION_TEXT = {key: value for key, value in _DECODER.items() if key not in ("bos_token_id", "eos_token_id")}

MODELS: dict[str, Tiny] = {
    tiny.name: tiny
    for tiny in (
        _decoder("llama", "Llama"),
        _decoder("llama-tied", "Llama", tied=True),
        _decoder("qwen3", "Qwen3", head_dim=8),
        _decoder("gemma", "Gemma", tied=True, head_dim=8),
        _decoder("gemma3", "Gemma3", tied=True, head_dim=8, config_class="Gemma3TextConfig", query_pre_attn_scalar=8),
        Tiny(
            "gpt2",
            "GPT2LMHeadModel",
            "GPT2Config",
            _GPT2,
            "AutoModelForCausalLM",
            inputs.text,
            _GPT2_ROLES | {"head": ("lm_head",)},
            tied=True,
            layers="h",
        ),
        Tiny(
            "gpt2-classifier",
            "GPT2ForSequenceClassification",
            "GPT2Config",
            _GPT2 | {"num_labels": 3},
            "AutoModelForSequenceClassification",
            inputs.text,
            _GPT2_ROLES | {"classifier": ("score",)},
            layers="h",
        ),
        Tiny(
            "bert",
            "BertForMaskedLM",
            "BertConfig",
            _BERT,
            "AutoModelForMaskedLM",
            inputs.masked_text,
            _BERT_ROLES | {"head": ("cls.predictions.decoder",)},
            tied=True,
            layers="layer",
        ),
        Tiny(
            "bert-classifier",
            "BertForSequenceClassification",
            "BertConfig",
            _BERT | {"num_labels": 3},
            "AutoModelForSequenceClassification",
            inputs.masked_text,
            _BERT_ROLES | {"classifier": ("classifier",)},
            layers="layer",
        ),
        Tiny(
            "distilbert-classifier",
            "DistilBertForSequenceClassification",
            "DistilBertConfig",
            {
                "vocab_size": VOCAB,
                "dim": HIDDEN,
                "hidden_dim": WIDE,
                "n_layers": 2,
                "n_heads": 2,
                "max_position_embeddings": 16,
                "num_labels": 3,
            },
            "AutoModelForSequenceClassification",
            inputs.masked_text,
            {
                "linear": ("q_lin", "v_lin", "lin1"),
                "biased": ("q_lin", "lin1"),
                "embedding": ("word_embeddings",),
                "classifier": ("pre_classifier", "classifier"),
            },
            layers="layer",
        ),
        Tiny(
            "t5",
            "T5ForConditionalGeneration",
            "T5Config",
            {
                "vocab_size": VOCAB,
                "d_model": HIDDEN,
                "d_ff": WIDE,
                "d_kv": 12,
                "num_layers": 2,
                "num_heads": 2,
                "decoder_start_token_id": 0,
            },
            "AutoModelForSeq2SeqLM",
            inputs.seq2seq,
            {"linear": ("q", "v", "wo"), "embedding": ("embed_tokens",), "head": ("lm_head",)},
            tied=True,
            layers="block",
        ),
        Tiny(
            "whisper",
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            {
                "vocab_size": VOCAB,
                "d_model": HIDDEN,
                "encoder_layers": 1,
                "decoder_layers": 2,
                "encoder_attention_heads": 2,
                "decoder_attention_heads": 2,
                "encoder_ffn_dim": WIDE,
                "decoder_ffn_dim": WIDE,
                "num_mel_bins": 8,
                "max_source_positions": 10,
                "max_target_positions": 16,
                "pad_token_id": 0,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "decoder_start_token_id": 1,
            },
            "AutoModelForSpeechSeq2Seq",
            inputs.speech,
            {
                "linear": ("q_proj", "v_proj", "fc1"),
                "biased": ("q_proj", "fc1"),
                "embedding": ("embed_tokens",),
                "head": ("proj_out",),
            },
            tied=True,
            layers="layers",
        ),
        Tiny(
            "vit",
            "ViTForImageClassification",
            "ViTConfig",
            {
                "hidden_size": HIDDEN,
                "intermediate_size": WIDE,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 8,
                "patch_size": 4,
                "num_labels": 3,
            },
            "AutoModelForImageClassification",
            inputs.image,
            {
                "linear": ("q_proj", "v_proj", "fc1"),
                "biased": ("q_proj", "fc1"),
                "conv": ("projection",),
                "classifier": ("classifier",),
            },
            layers="layers",
        ),
        Tiny(
            "wav2vec2",
            "Wav2Vec2ForCTC",
            "Wav2Vec2Config",
            {
                "vocab_size": VOCAB,
                "hidden_size": HIDDEN,
                "intermediate_size": WIDE,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "conv_dim": (8, 12),
                "conv_kernel": (3, 2),
                "conv_stride": (2, 2),
                "num_conv_pos_embeddings": 4,
                "num_conv_pos_embedding_groups": 2,
            },
            "AutoModelForCTC",
            inputs.waveform,
            {
                "linear": ("q_proj", "v_proj", "intermediate_dense"),
                "biased": ("q_proj", "intermediate_dense"),
                "conv": ("conv_layers.0.conv", "conv_layers.1.conv"),
                "grouped": ("pos_conv_embed.conv",),
                "classifier": ("lm_head",),
            },
            layers="layers",
        ),
        Tiny(
            "qwen2-vl",
            "Qwen2VLForConditionalGeneration",
            "Qwen2VLConfig",
            {
                "text_config": _VISION_TEXT
                | {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2], "rope_type": "default"}},
                "vision_config": {
                    "depth": 1,
                    "embed_dim": HIDDEN,
                    "hidden_size": HIDDEN,
                    "num_heads": 2,
                    "mlp_ratio": 2,
                    "patch_size": 2,
                    "spatial_merge_size": 2,
                    "temporal_patch_size": 2,
                },
                "image_token_id": 36,
                "video_token_id": 37,
                "vision_start_token_id": 34,
                "vision_end_token_id": 35,
                "tie_word_embeddings": False,
            },
            "AutoModelForImageTextToText",
            inputs.qwen2_vl,
            _DECODER_ROLES
            | {
                "linear": ("q_proj", "v_proj", "attn.qkv", "down_proj"),
                "biased": ("q_proj", "attn.qkv"),
                "conv": ("patch_embed.proj",),
            },
            layers="layers",
        ),
        Tiny(
            "llava",
            "LlavaForConditionalGeneration",
            "LlavaConfig",
            {
                "text_config": _VISION_TEXT | {"model_type": "llama"},
                "vision_config": {
                    "model_type": "clip_vision_model",
                    "hidden_size": HIDDEN,
                    "intermediate_size": WIDE,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "image_size": 8,
                    "patch_size": 4,
                    "projection_dim": HIDDEN,
                },
                "image_token_index": 36,
                "vision_feature_layer": -1,
                "tie_word_embeddings": False,
            },
            "AutoModelForImageTextToText",
            inputs.llava,
            _DECODER_ROLES | {"conv": ("patch_embedding",), "linear": ("q_proj", "down_proj", "linear_1")},
            layers="layers",
        ),
        _experts("mixtral", "Mixtral", num_local_experts=3),
        _experts("qwen3-moe", "Qwen3Moe", num_experts=3, moe_intermediate_size=12, head_dim=8, decoder_sparse_step=1),
        _experts("gpt-oss", "GptOss", num_local_experts=3, head_dim=8, layer_types=["full_attention"] * 2),
    )
}
