"""The adapters of torchtune: its own names, as a pickle (``adapter_0.pt``, ``adapter_model.pt``) or in safetensors.

``layers.N.attn.q_proj.lora_a.weight``, ``….lora_b.weight`` and, of a DoRA, ``….magnitude`` (one for each output, of the
merged weight), with PEFT's ``adapter_config.json`` beside them, whose ``lora_alpha`` scales. Rows of q and k are in the
order of Meta's own models for some types (``torchtune/models/convert_weights.py``, ``models/*/_convert_weights.py``).
What torchtune writes for PEFT is a PEFT folder.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from mapconv.adapter import Adapter, Module, TensorRef
from mapconv.errors import AdapterError, UnsupportedError
from mapconv.formats.base import CONFIG_FILE, WEIGHTS_FILE, Found, adapter_of
from mapconv.formats.config import read_config
from mapconv.formats.pickle import PICKLE_FILE, read_pickle
from mapconv.spelling import HeadRows
from mapconv.untrusted.schema import NUMBER, shown

_FILE = re.compile(r"adapter_(?:[0-9]{1,6}|model)\.pt")
_KEY = re.compile(
    r"(?:(?P<layer>layers\.[0-9]{1,5})\.)?(?P<name>[a-z0-9_.]+?)\.(?P<part>lora_a|lora_b|magnitude)(?:\.weight)?"
)
_SIGN = re.compile(r"layers\.[0-9]+\.(?:attn|mlp)\.[a-z0-9_]+\.lora_a\.weight")
_IN_LAYER = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
_TYPES = frozenset({"llama", "mistral", "gemma", "gemma2"}), frozenset({"qwen2", "qwen3", "phi3"})
_ROWS = {f"attn.{name}_proj": HeadRows(name, *_TYPES) for name in ("q", "k")}
_PARTS = {"lora_a", "lora_b", "magnitude"}


class TorchtuneAdapter:
    """The dialect that torchtune's LoRA recipes write."""

    def recognise(self, found: Found) -> bool:
        if found.path.is_dir() and any((found.path / name).is_file() for name in (WEIGHTS_FILE, PICKLE_FILE)):
            return _has_own_names(found)  # else its export to PEFT
        return bool(_pickles(found.path)) or _has_own_names(found)

    def read(self, found: Found, *, allow_pickle: bool = False) -> Adapter:
        file, refs = _weights(found, allow_pickle=allow_pickle)
        alpha, base = _settings(found)
        parts: dict[str, dict[str, TensorRef]] = defaultdict(dict)
        orders: dict[str, HeadRows] = {}
        for ref in refs:
            match = _KEY.fullmatch(ref.name)
            path = None if match is None else _path(match["layer"], match["name"])
            if match is None or path is None:
                raise UnsupportedError(f"{file}: {ref.name} is not a LoRA of torchtune as mapconv knows them.")
            parts[path][match["part"]] = ref
            if match["layer"] and match["name"] in _ROWS:
                orders[path] = _ROWS[match["name"]]
        modules = [
            replace(_module(file, path, own, alpha), interleaved=orders.get(path)) for path, own in parts.items()
        ]
        return adapter_of(found.path, modules, "torchtune", base=base)


def _pickles(path: Path) -> list[Path]:
    files = [path] if path.is_file() else sorted(path.glob("adapter_*.pt"))
    return [file for file in files if _FILE.fullmatch(file.name)]


def _has_own_names(found: Found) -> bool:
    if found.path.is_file() and found.path.suffix == ".pt":
        return False  # named as a safetensors file it would have a header
    return found.header is not None and any(_SIGN.fullmatch(ref.name) for ref in found.header.tensors)


def _weights(found: Found, *, allow_pickle: bool) -> tuple[Path, tuple[TensorRef, ...]]:
    if _has_own_names(found):
        assert found.header is not None
        return found.header.path, found.header.tensors
    files = _pickles(found.path)
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise AdapterError(f"{found.path} holds the adapters of several epochs ({names}): give one of the files.")
    return files[0], read_pickle(files[0], allow_pickle=allow_pickle)


def _settings(found: Found) -> tuple[float, str | None]:
    """(alpha, the base that is named)."""
    place = (found.path if found.path.is_dir() else found.path.parent) / CONFIG_FILE
    config = read_config(place) if place.is_file() else {}
    alpha, base = config.get("lora_alpha"), config.get("base_model_name_or_path")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not NUMBER.holds(alpha):
        raise AdapterError(
            f"{found.path} is an adapter of torchtune without its scaling: {place} gives lora_alpha as {shown(alpha)}, "
            "expected a number (the one in the recipe's configuration)."
        )
    return float(alpha), base if isinstance(base, str) and base else None


def _path(layer: str | None, name: str) -> str | None:
    """transformers' name of a module."""
    if layer is None:
        return "lm_head" if name == "output" else None
    return None if name not in _IN_LAYER else f"model.{layer}.{_IN_LAYER[name]}"


def _module(file: Path, path: str, parts: dict[str, TensorRef], alpha: float) -> Module:
    known = next(iter(parts.values()))
    if parts.keys() - {"magnitude"} != {"lora_a", "lora_b"}:
        raise AdapterError(f"{file}: {known.name} has no counterpart (lora_a and lora_b): the file is incomplete.")
    A, B, magnitude = parts["lora_a"], parts["lora_b"], parts.get("magnitude")
    if len(A.shape) != 2 or len(B.shape) != 2 or A.shape[0] != B.shape[1] or not A.shape[0]:
        raise AdapterError(f"{file}: {A.name} is {list(A.shape)} and {B.name} is {list(B.shape)}: no factors.")
    if magnitude is not None and magnitude.shape != B.shape[:1]:
        raise AdapterError(f"{file}: {magnitude.name} is {list(magnitude.shape)}, expected {[B.shape[0]]}.")
    return Module(path, A.shape[0], alpha / A.shape[0], A, B, magnitude)
