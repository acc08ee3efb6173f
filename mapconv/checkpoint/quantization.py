"""What a model's configuration says of its quantization, and the configuration of the plain model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mapconv.checkpoint.gguf.header import is_gguf
from mapconv.errors import CheckpointError
from mapconv.jsonfile import read_object

#: transformers' key, and mlx-lm's.
QUANTIZATION_KEYS = ("quantization_config", "quantization")
#: Where older exports of ModelOpt say it, beside ``config.json``.
MODELOPT_FILE = "hf_quant_config.json"


def quantization_settings(folder: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The quantization configuration of a model, wherever it stands; None for a plain model.

    Raises:
        CheckpointError: one that is not an object.
    """
    if is_gguf(folder):
        return {"quant_method": "gguf"}
    for part in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        for key in QUANTIZATION_KEYS:
            settings = part.get(key)
            if not settings:
                continue
            if not isinstance(settings, Mapping):
                raise CheckpointError(
                    f"{folder}/config.json says that the model is quantized ({settings!r}), which is not an object: "
                    "give the 16-bit or 32-bit model with --base."
                )
            return {"quant_method": "mlx" if key == "quantization" else None} | dict(settings)
    path = folder / MODELOPT_FILE
    if path.is_file():
        settings = read_object(path, CheckpointError).get("quantization")
        if isinstance(settings, dict):
            return {"quant_method": "modelopt"} | settings
    return None


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of the same model in plain weights."""
    plain = {key: value for key, value in config.items() if key not in QUANTIZATION_KEYS}
    return {key: without_quantization(value) if isinstance(value, Mapping) else value for key, value in plain.items()}
