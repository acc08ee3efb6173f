"""Whatever ComfyUI reads: every ending under every prefix, or under none (``comfy/lora.py``, ``comfy/weight_adapter``).

The files of ai-toolkit, of Wan, Qwen-Image, LTX and HunyuanVideo, and of Flux control are such. An alpha is beside the
factors, and without one the scaling is 1.
"""

from __future__ import annotations

from mapconv.formats.image import lycoris
from mapconv.formats.image.keys import DENOISER, KeyTable, Prefix
from mapconv.formats.image.reading import ImageDialect

_TEXT_ENCODERS = {
    "clip_l": ("text_encoder",),
    "clip_g": ("text_encoder_2",),
    "t5xxl": ("text_encoder_3", "text_encoder_2"),
}
PREFIXES = (
    *(Prefix(f"text_encoders.{name}.transformer.", models) for name, models in _TEXT_ENCODERS.items()),
    Prefix("text_encoders.", ("text_encoder", "text_encoder_2", "text_encoder_3")),
    Prefix("model.diffusion_model.", DENOISER),
    Prefix("diffusion_model.", DENOISER),
    Prefix("transformer.", DENOISER),
    Prefix("unet.", DENOISER),
    Prefix("text_encoder.", ("text_encoder",)),
    Prefix("text_encoder_2.", ("text_encoder_2",)),
    *lycoris.PREFIXES,
    Prefix("", DENOISER),
)
_FACTORS = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_A": "down",
    ".lora_B": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
}
ENDINGS = (
    lycoris.ENDINGS
    | _FACTORS
    | {".lora_B.bias": "diff_b", ".magnitude": "magnitude", ".lora_magnitude_vector": "magnitude"}
    | {".set_weight": "set_weight"}
)

COMFYUI = ImageDialect(
    "ComfyUI",
    KeyTable(PREFIXES, ENDINGS),
    frozenset(key for key, part in ENDINGS.items() if part not in ("alpha", "dora_scale", "magnitude")),
)
