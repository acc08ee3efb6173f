"""Tiny vision-language models whose bare class names its modules without the ``model.`` that the whole one has."""

from __future__ import annotations

from . import inputs
from .sizes import DECODER_ROLES, VISION_TEXT
from .tiny import HIDDEN, WIDE, Tiny

_SIGLIP = {
    "hidden_size": HIDDEN,
    "intermediate_size": WIDE,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "vision_use_head": False,
}
_QWEN3_VISION = {
    "depth": 1,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDE,
    "out_hidden_size": HIDDEN,
    "num_heads": 2,
    "patch_size": 2,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}


def _vision_text(name: str, family: str, pictures, *, tied: bool = False, **settings) -> Tiny:
    return Tiny(
        name=name,
        model_class=f"{family}ForConditionalGeneration",
        config_class=f"{family}Config",
        settings={"tie_word_embeddings": tied} | settings,
        auto="AutoModelForImageTextToText",
        inputs=pictures,
        roles={"linear": ("q_proj", "down_proj")} | {"head": DECODER_ROLES["head"]},
        tied=tied,
        layers="layers",
    )


MODELS = (
    _vision_text(
        "paligemma",
        "PaliGemma",
        inputs.paligemma,
        text_config=VISION_TEXT | {"model_type": "gemma", "head_dim": 8},
        vision_config=_SIGLIP | {"model_type": "siglip_vision_model", "projection_dim": HIDDEN},
        image_token_index=36,
        projection_dim=HIDDEN,
    ),
    _vision_text(
        "gemma3-vl",
        "Gemma3",
        inputs.gemma3,
        text_config=VISION_TEXT | {"model_type": "gemma3_text", "head_dim": 8, "query_pre_attn_scalar": 8},
        vision_config=_SIGLIP | {"model_type": "siglip_vision_model"},
        image_token_index=36,
        mm_tokens_per_image=4,
        tied=True,
    ),
    _vision_text(
        "qwen3-vl",
        "Qwen3VL",
        inputs.qwen2_vl,
        text_config=VISION_TEXT | {"head_dim": 8, "rope_scaling": {"mrope_section": [2, 1, 1], "rope_type": "default"}},
        vision_config=_QWEN3_VISION,
        image_token_id=36,
        video_token_id=37,
        vision_start_token_id=34,
        vision_end_token_id=35,
    ),
    _vision_text(
        "idefics3",
        "Idefics3",
        inputs.idefics3,
        text_config=VISION_TEXT | {"model_type": "llama"},
        vision_config={key: value for key, value in _SIGLIP.items() if key != "vision_use_head"},
        image_token_id=36,
        scale_factor=2,
    ),
)
