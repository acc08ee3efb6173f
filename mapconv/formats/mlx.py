"""The adapters of MLX-LM: ``adapters.safetensors`` beside its own ``adapter_config.json``.

A linear layer has ``lora_a`` (in, r) and ``lora_b`` (r, out), Δ = scale·(a·b)ᵀ with no division by r; an embedding has
(tokens, r) and (r, width), Δ = scale·a·b. A DoRA has ``m``, one magnitude for each output, of the merged weight
(``mlx_lm/tuner/lora.py``, ``dora.py``). Names are transformers'.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from typing import Any

from mapconv.adapter import Adapter, Module, TensorRef
from mapconv.checkpoint.derived import TransposedTensor, derived
from mapconv.errors import AdapterError, UnsupportedError
from mapconv.formats.base import CONFIG_FILE, Found, adapter_of
from mapconv.untrusted.schema import shown

_PART = re.compile(r"(?P<path>.+)\.(?P<part>lora_a|lora_b|m)")
_FLOATS = ("F32", "F16", "BF16")
MLX_WEIGHTS = "adapters.safetensors"
_EMBEDDINGS = ("embed_tokens", "wte", "tok_embeddings")


class MlxAdapter:
    """The dialect that ``mlx_lm.lora`` writes."""

    def recognise(self, found: Found) -> bool:
        config, header = found.config, found.header
        return config is not None and "lora_parameters" in config and header is not None and "peft_type" not in config

    def read(self, found: Found, *, allow_pickle: bool = False) -> Adapter:
        config, header = found.config or {}, found.header
        assert header is not None  # it was recognised by it
        place = found.path / CONFIG_FILE
        kind = config.get("fine_tune_type", "lora")
        if kind not in ("lora", "dora"):
            raise UnsupportedError(f"{place}: fine_tune_type is {shown(kind)}, and mapconv converts lora and dora.")
        scale = _scale(config, place)
        parts: dict[str, dict[str, TensorRef]] = defaultdict(dict)
        for ref in header.tensors:
            match = _PART.fullmatch(ref.name)
            if match is None:
                raise AdapterError(f"{ref.file}: {ref.name} is no part of a LoRA of MLX-LM (lora_a, lora_b or m).")
            if ref.dtype not in _FLOATS:
                raise AdapterError(f"{ref.file}: {ref.name} has dtype {ref.dtype}, expected {', '.join(_FLOATS)}.")
            parts[match["path"]][match["part"]] = ref
        if not parts:
            raise AdapterError(f"{header.path} holds no tensors.")
        modules = tuple(_module(path, tensors, scale, dora=kind == "dora") for path, tensors in parts.items())
        base = config.get("model")
        return adapter_of(found.path, modules, "MLX-LM", base=base if isinstance(base, str) and base else None)


def _scale(config: dict[str, Any], place: object) -> float:
    parameters = config.get("lora_parameters")
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise AdapterError(f"{place}: lora_parameters has the scale {shown(scale)}, expected a number.")
    return float(scale)


def _module(path: str, parts: dict[str, TensorRef], scale: float, *, dora: bool) -> Module:
    known = next(iter(parts.values()))
    wanted = ("lora_a", "lora_b", "m") if dora else ("lora_a", "lora_b")
    if set(parts) != set(wanted):
        raise AdapterError(
            f"{known.file}: module {path} has {', '.join(sorted(parts))}, expected {', '.join(wanted)} "
            f"(fine_tune_type is {'dora' if dora else 'lora'})."
        )
    a, b, magnitude = parts["lora_a"], parts["lora_b"], parts.get("m")
    if len(a.shape) == 3:
        raise UnsupportedError(
            f"{a.file}: {a.name} is {list(a.shape)}, a stack of experts, which mapconv does not read: merge it "
            " with mlx_lm.fuse."
        )
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[1] != b.shape[0] or not a.shape[1]:
        raise AdapterError(f"{a.file}: {a.name} is {list(a.shape)} and {b.name} is {list(b.shape)}: no factors.")
    rank, height = a.shape[1], b.shape[1]
    embedding = path.rpartition(".")[2] in _EMBEDDINGS
    if magnitude is not None and (embedding or magnitude.shape != (height,)):
        raise UnsupportedError(
            f"{magnitude.file}: {magnitude.name} is {list(magnitude.shape)}, expected {[height]} for a linear layer."
        )
    # Either layer has a stored first factor (in, r) and a second (r, out).
    A = derived(a.name, (rank, a.shape[0]), TransposedTensor((a,)))
    B = derived(b.name, (height, rank), TransposedTensor((b,)))
    return Module(path, rank, scale, A, B, magnitude, embedding=embedding)
