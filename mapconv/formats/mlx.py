"""The adapters of MLX-LM: ``adapters.safetensors`` beside its own ``adapter_config.json``.

A linear layer has ``lora_a`` (in, r) and ``lora_b`` (r, out), Δ = scale·(a·b)ᵀ with no division by r; an embedding has
(tokens, r) and (r, width), Δ = scale·a·b. A DoRA has ``m``, one magnitude for each output, of the merged weight
(``mlx_lm/tuner/lora.py``, ``dora.py``). Names are transformers'. Of the type ``full`` the file holds the trained layers
themselves.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mapconv.adapter import Adapter, Module, TensorRef, WholeTensor
from mapconv.checkpoint.derived import TransposedTensor, derived
from mapconv.checkpoint.headers import TensorFile
from mapconv.errors import AdapterError, UnsupportedError
from mapconv.formats.base import CONFIG_FILE, Found, adapter_of
from mapconv.formats.experts import unstacked
from mapconv.formats.peft import KEY_PREFIX
from mapconv.untrusted.schema import NUMBER, shown

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
        kind, base = config.get("fine_tune_type", "lora"), config.get("model")
        base = base if isinstance(base, str) and base else None
        if kind == "full":
            return _full(found.path, header, base)
        if kind not in ("lora", "dora"):
            raise UnsupportedError(f"{place}: fine_tune_type is {shown(kind)}, expected lora, dora or full.")
        scale = _scale(config, place)
        parts: dict[str, dict[str, TensorRef]] = defaultdict(dict)
        for ref in header.tensors:
            match = _PART.fullmatch(ref.name)
            if match is None:
                raise AdapterError(f"{ref.file}: {ref.name} is not a part of an MLX-LM LoRA (lora_a, lora_b or m).")
            if ref.dtype not in _FLOATS:
                raise AdapterError(f"{ref.file}: {ref.name} has dtype {ref.dtype}, expected {', '.join(_FLOATS)}.")
            parts[match["path"]][match["part"]] = ref
        if not parts:
            raise AdapterError(f"{header.path} holds no tensors.")
        modules = tuple(
            _module(path, own, scale, dora=kind == "dora", stacked=path not in parts)
            for path, own in unstacked(parts, "lora_a", "lora_b").items()
        )
        return adapter_of(found.path, modules, "MLX-LM", base=base)


def _full(path: Path, file: TensorFile, base: str | None) -> Adapter:
    """The layers that were trained, whole: each tensor takes the place of the base's."""
    for ref in file.tensors:
        if ref.dtype not in _FLOATS:
            raise UnsupportedError(
                f"{ref.file}: {ref.name} has dtype {ref.dtype}: train on the model that is not quantized."
            )
        if ".switch_mlp." in ref.name:
            raise UnsupportedError(
                f"{ref.file}: {ref.name} is a stack of experts, trained whole: fuse it with mlx_lm.fuse, and take the "
                "model with `mapconv extract`."
            )
    if not file.tensors:
        raise AdapterError(f"{file.path} holds no tensors.")
    whole = tuple(WholeTensor(ref.name, ref, in_place=True) for ref in file.tensors)
    adapter = adapter_of(path, (), "MLX-LM", base=base)
    others = {KEY_PREFIX + ref.name: ref for ref in file.tensors}
    return replace(adapter, method="full layers", whole=whole, others=others)


def _scale(config: dict[str, Any], place: object) -> float:
    parameters = config.get("lora_parameters")
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    if not isinstance(scale, int | float) or not NUMBER.holds(scale):
        raise AdapterError(f"{place}: lora_parameters has the scale {shown(scale)}, expected a number.")
    return float(scale)


def _module(path: str, parts: Mapping[str, TensorRef], scale: float, *, dora: bool, stacked: bool) -> Module:
    known = next(iter(parts.values()))
    wanted = ("lora_a", "lora_b", "m") if dora and not stacked else ("lora_a", "lora_b")
    if set(parts) != set(wanted):
        raise AdapterError(
            f"{known.file}: module {path} has {', '.join(sorted(parts))}, expected {', '.join(wanted)} "
            f"(fine_tune_type is {'dora' if dora else 'lora'})."
        )
    a, b, magnitude = parts["lora_a"], parts["lora_b"], parts.get("m")
    if stacked:  # those of experts are as PEFT has them
        return Module(path, a.shape[0], scale, a, b)
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
