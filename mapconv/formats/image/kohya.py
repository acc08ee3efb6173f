"""The files of kohya's sd-scripts, and of trainers that write as they do (musubi-tuner, OneTrainer, ComfyUI's nodes).

``networks/lora.py``: ``lora_unet_`` and ``lora_te_`` before a module's path with underscores for dots; a module's alpha
beside its factors, without which the scaling is 1.
"""

from __future__ import annotations

from mapconv.formats.image.keys import DENOISER, KeyTable, Prefix
from mapconv.formats.image.reading import ImageDialect

PREFIXES = (
    # Wan's training scripts (VideoX-Fun) join the prefix and the path by one more.
    Prefix("lora_unet__", DENOISER, flat=True),
    Prefix("lora_unet_", DENOISER, flat=True),
    Prefix("lora_transformer_", DENOISER, flat=True),
    Prefix("lora_te1_", ("text_encoder",), flat=True),
    Prefix("lora_te2_", ("text_encoder_2",), flat=True),
    # The T5 of SD3 is its third text encoder; that of Flux is the second in a pipeline of diffusers.
    Prefix("lora_te3_", ("text_encoder_3", "text_encoder_2"), flat=True),
    Prefix("lora_te_", ("text_encoder",), flat=True),
)
ENDINGS = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_mid.weight": "mid",
    ".alpha": "alpha",
    ".dora_scale": "dora_scale",
}

KOHYA = ImageDialect("kohya's sd-scripts", KeyTable(PREFIXES, ENDINGS), frozenset(ENDINGS))
