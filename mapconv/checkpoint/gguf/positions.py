"""How a GGUF file says its rotary positions, in transformers' ``rope_parameters``."""

from __future__ import annotations

import math
from typing import Any

from mapconv.checkpoint.gguf.families import Family
from mapconv.checkpoint.gguf.settings import Settings
from mapconv.errors import CheckpointError, UnsupportedError

_FACTORS = "rope_freqs.weight"
#: Of every Llama 3 with longer positions; the file has only what follows from them.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
#: Of the layers with a window in Gemma 3.
_GEMMA3_LOCAL = {"rope_type": "default", "rope_theta": 10_000.0}


def rope_parameters(settings: Settings, family: Family, head_dim: int) -> dict[str, Any]:
    """The parameters of a model's positions.

    Raises:
        UnsupportedError: a kind that no class here knows, or frequencies that its parameters do not give.
    """
    theta = settings.number("rope.freq_base", 10_000.0)
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    kind = settings.find("rope.scaling.type")
    if kind in ("linear", "yarn"):
        parameters |= {"rope_type": kind, "factor": settings.number("rope.scaling.factor")}
    elif kind not in (None, "none", "longrope"):
        raise UnsupportedError(
            f"{settings.file.path} scales its positions by {kind!r}, which mapconv does not know for GGUF: give the "
            "16-bit or 32-bit model with --base."
        )
    if kind == "yarn":
        parameters["original_max_position_embeddings"] = settings.count("rope.scaling.original_context_length")
    factors = settings.file.settings.get(_FACTORS)
    if factors is not None and any(factor != 1 for factor in factors):
        parameters |= _llama3(settings, theta, head_dim, factors)
    if family.model_type == "phi3":
        parameters |= _phi3(settings, head_dim)
    if family.model_type == "gemma3_text":
        return {"full_attention": parameters, "sliding_attention": dict(_GEMMA3_LOCAL)}
    return parameters


def _llama3(settings: Settings, theta: float, head_dim: int, factors: tuple[float, ...]) -> dict[str, Any]:
    """The parameters that give these divisors of the frequencies, which are all that the file has."""
    parameters = {"rope_type": "llama3", "factor": float(max(factors)), **_LLAMA3}
    expected = llama3_factors(theta, head_dim, parameters["factor"])
    # The file's were computed in float32: a few roundings apart.
    near = all(abs(found / wanted - 1) <= 1e-5 for found, wanted in zip(factors, expected, strict=False))
    if settings.architecture != "llama" or len(expected) != len(factors) or not near:
        raise UnsupportedError(
            f"{settings.file.path}: {_FACTORS} is not what Llama 3's scaling of positions gives, and nothing in the "
            "file says what does: put the model's config.json beside it, or give the 16-bit model with --base."
        )
    return parameters


def llama3_factors(theta: float, head_dim: int, factor: float) -> list[float]:
    """By how much each of the head_dim / 2 frequencies is divided: not at all if short, by ``factor`` if long."""
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    factors = []
    for dimension in range(0, head_dim, 2):
        turns = _LLAMA3["original_max_position_embeddings"] * theta ** (-dimension / head_dim) / (2 * math.pi)
        smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors


def _phi3(settings: Settings, head_dim: int) -> dict[str, Any]:
    rotary = settings.count("rope.dimension_count", head_dim)
    parameters: dict[str, Any] = {} if rotary == head_dim else {"partial_rotary_factor": rotary / head_dim}
    long, short = (settings.file.settings.get(f"rope_factors_{name}.weight") for name in ("long", "short"))
    if long is None and short is None:
        return parameters
    if long is None or short is None:
        raise CheckpointError(
            f"{settings.file.path} has rope_factors of one length of texts, expected both: download it again."
        )
    return parameters | {
        "rope_type": "longrope",
        "long_factor": [_short(value) for value in long],
        "short_factor": [_short(value) for value in short],
        "original_max_position_embeddings": settings.count("rope.scaling.original_context_length"),
    }


def _short(value: float) -> float:
    return float(f"{value:.7g}")
