"""The files that diffusers' ``save_lora_weights`` writes, old and new.

Old: attention processors (``….attn1.processor.to_q_lora.down.weight``), text encoders with ``.lora_linear_layer.``.
New: PEFT's names behind the model's (``unet.….lora_A.weight``), with PEFT's configuration as JSON in the header's
``lora_adapter_metadata``; without it the scaling is 1 (``diffusers/loaders/lora_base.py``). MAP's authors save images'
adapters so, each module's two scalars beside its factors.
"""

from __future__ import annotations

import json
from typing import Any

from mapconv.adapter import LoraSettings
from mapconv.checkpoint.headers import TensorFile
from mapconv.errors import AdapterError
from mapconv.formats.config import parse_settings
from mapconv.formats.image.keys import DENOISER, KeyParts, KeyTable, Prefix
from mapconv.formats.image.reading import Floor, ImageDialect, Scaling
from mapconv.formats.lomap import floor_of, uses_map, without_map

_MODELS = {
    "unet": DENOISER,
    "transformer": DENOISER,
    "prior": DENOISER,
    "text_encoder": ("text_encoder",),
    "text_encoder_2": ("text_encoder_2",),
    "text_encoder_3": ("text_encoder_3",),
}
_NEW = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_B.bias": "diff_b",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".alpha": "alpha",
}
_OLD = {
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
}
#: The scalars of MAP's authors, as ``formats.lomap`` spells them.
_SCALARS = {
    f".{spelling}map_{which}{end}": f"map_{which}"
    for spelling in ("lora_", "")
    for which in ("alpha", "beta")
    for end in ("", ".default")
}
_RENAMES = ((r"\.processor\.(to_[qkv])$", r".\1"), (r"\.processor\.to_out$", ".to_out.0"))
_PREFIXES = tuple(Prefix(f"{name}.", components) for name, components in _MODELS.items())
#: The attention processors were saved without the model's name as well.
_BARE = tuple(Prefix(text, DENOISER, kept=True) for text in ("down_blocks", "up_blocks", "mid_block"))
_METADATA = "lora_adapter_metadata"


def _configs(file: TensorFile) -> dict[str, dict[str, Any]]:
    """PEFT's configuration of each model, as the header has it."""
    text = file.metadata.get(_METADATA)
    if text is None:
        return {}
    try:
        table = json.loads(text)
    except (ValueError, RecursionError):
        table = None
    if not isinstance(table, dict):
        raise AdapterError(
            f"{file.path} has a {_METADATA} in its header that is not a JSON object: save the file again."
        )
    found = {}
    for model in _MODELS:
        config = {key.removeprefix(f"{model}."): value for key, value in table.items() if key.startswith(f"{model}.")}
        if config:
            found[model] = config
    return found


def _alphas(file: TensorFile) -> Scaling:
    """What the header's configuration says of each model's modules."""
    settings = {model: _settings(config, file) for model, config in _configs(file).items()}

    def scaling(parts: KeyParts) -> float | None:
        model, _, _ = parts.path.partition(".")
        found = settings.get(model)
        if found is None:
            return None
        return (
            found.scaling_of(parts.spelling.name) * parts.tensors["down"].shape[0] if "down" in parts.tensors else None
        )

    return scaling


def _settings(config: dict[str, Any], file: TensorFile) -> LoraSettings:
    return parse_settings({"peft_type": "LORA", **without_map(config)}, file.path)


def _floors(file: TensorFile) -> Floor:
    """The floor under the norms of MAP's authors, in a model whose configuration says that it is theirs."""
    floors = {model: floor_of(config, file.path) for model, config in _configs(file).items() if uses_map(config)}
    return lambda parts: floors.get(parts.path.partition(".")[0])


DIFFUSERS = ImageDialect(
    "diffusers",
    KeyTable((*_PREFIXES, *_BARE), _NEW | _OLD | _SCALARS, _RENAMES),
    frozenset(key for key, part in (_NEW | _OLD).items() if part in ("down", "up")),
    mixes=True,
    alphas=_alphas,
    floors=_floors,
)
