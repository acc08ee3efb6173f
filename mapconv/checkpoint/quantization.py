"""What a model's configuration says of its quantization, and the configuration of the plain model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
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


#: Where each storage's configuration lists modules that stay plain.
_PLAIN_MODULES = {
    **dict.fromkeys(("fp8", "mxfp4", "awq", "fbgemm_fp8"), "modules_to_not_convert"),
    "bitsandbytes": "llm_int8_skip_modules",
    **dict.fromkeys(("compressed-tensors", "compressed_tensors", "modelopt", "modelopt_fp4"), "ignore"),
}


def with_plain_modules(settings: Mapping[str, Any], modules: Sequence[str], others: Sequence[str]) -> dict[str, Any]:
    """A quantization configuration under which ``modules`` are plain, too.

    Args:
        settings: the configuration, whose storage ``can_leave_out`` knows.
        modules: their paths.
        others: modules that are plain already: a list that was absent stood for the loader's own choice.
    """
    method = settings.get("quant_method")
    if method == "gptq":
        rules = {f"-:{re.escape(path)}$": {} for path in modules}
        return dict(settings) | {"dynamic": rules | dict(settings.get("dynamic") or {})}
    key = _PLAIN_MODULES[str(method)]
    known = settings.get(key)
    listed = list(others) if known is None else list(known)
    return dict(settings) | {key: list(dict.fromkeys([*listed, *modules]))}


def can_leave_out(settings: Mapping[str, Any] | None) -> bool:
    """Whether the storage's configuration can say that single modules are plain."""
    method = None if settings is None else settings.get("quant_method")
    return method == "gptq" or method in _PLAIN_MODULES


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of the same model in plain weights."""
    plain = {key: value for key, value in config.items() if key not in QUANTIZATION_KEYS}
    return {key: without_quantization(value) if isinstance(value, Mapping) else value for key, value in plain.items()}
