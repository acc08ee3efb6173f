"""XLabs' processors of Flux: the names of the model's authors, with the image's and the text's stream as a number."""

from __future__ import annotations

from mapconv.formats.image.keys import DENOISER, KeyTable, Prefix
from mapconv.formats.image.reading import ImageDialect

_RENAMES = (
    (r"\.processor\.(qkv|proj)_lora1$", r".img_attn.\1"),
    (r"\.processor\.(qkv|proj)_lora2$", r".txt_attn.\1"),
    (r"^(single_blocks\..*)\.processor\.qkv_lora$", r"\1.attn.qkv"),
    (r"^(single_blocks\..*)\.processor\.proj_lora$", r"\1.linear2"),
)
_ENDINGS = {".down.weight": "down", ".up.weight": "up"}
_PREFIXES = tuple(Prefix(text, DENOISER) for text in ("diffusion_model.", ""))

XLABS = ImageDialect("XLabs' Flux trainer", KeyTable(_PREFIXES, _ENDINGS, _RENAMES), frozenset(_ENDINGS))
