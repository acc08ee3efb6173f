"""PEFT directories of methods besides LoRA: which layers they adapt, with the tensors of each.

MAP on such a method has the method's own file with two scalars more for each layer, ``map_alpha`` and ``map_beta``, the
α and β of W' = α·W0/‖W0‖ + β·Δ/‖Δ‖, and ``MAP_`` before the method's name as ``peft_type``.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mapconv.adapter import Adapter, Module, TensorRef
from mapconv.checkpoint.reader import TensorReader
from mapconv.errors import AdapterError
from mapconv.formats.base import CONFIG_FILE, Found
from mapconv.formats.config import parse_shared_settings
from mapconv.formats.methods import METHODS, WHOLE_METHODS, MethodFacts
from mapconv.formats.peft import key_prefix, natural_order, read_weights, whole_tensors
from mapconv.spelling import TunerMethod

#: Before the ``peft_type`` of a method under MAP: stock PEFT would load it without its scalars, and so refuses it.
MAP_PREFIX = "MAP_"
SCALAR_NAMES = ("map_alpha", "map_beta")
#: Of a tensor that belongs to no one layer: ``base_model.vera_A``.
_SHARED = re.compile(r"base_model\.(?!model\.)")


class PeftMethodDirectory:
    """The dialect that PEFT's ``save_pretrained`` writes for a method whose merge is a fixed weight."""

    def recognise(self, found: Found) -> bool:
        method = (found.config or {}).get("peft_type")
        if not isinstance(method, str):
            return False
        method = method.upper()
        return method.removeprefix(MAP_PREFIX) in METHODS or method in WHOLE_METHODS

    def read(self, found: Found, *, allow_pickle: bool = False) -> Adapter:
        path, config = found.path, dict(found.config or {})
        is_map = str(config["peft_type"]).upper().startswith(MAP_PREFIX)
        config["peft_type"] = kind = str(config["peft_type"]).upper().removeprefix(MAP_PREFIX)
        settings = parse_shared_settings(config, path / CONFIG_FILE)
        tensors = read_weights(found, allow_pickle=allow_pickle)
        shared = {ref.name: ref for ref in tensors if _SHARED.match(ref.name)}
        others = [ref for ref in tensors if ref.name not in shared]
        scalars, others = _scalars(others) if is_map else ({}, others)
        prefix, facts = key_prefix(others or tensors), METHODS.get(kind)
        modules: tuple[Module, ...] = ()
        if facts is not None:
            method = TunerMethod(facts.name, config, path / CONFIG_FILE, shared, facts.changes_bias)
            modules, others = _modules(others, prefix, facts, method)
            if is_map:
                modules = _with_scalars(modules, prefix, scalars, tensors[0].file)
            if not modules:
                raise AdapterError(
                    f"{tensors[0].file} holds no tensor of a {facts.name} layer, so that nothing says which layers it "
                    "adapts: save it with them (Uni-LoRA: save_indices=True)."
                )
        whole, saved, notes = whole_tensors(others, settings, {"default"}, prefix)
        return Adapter(
            path=path,
            method=WHOLE_METHODS[kind] if facts is None else f"MAP on {facts.name}" if is_map else facts.name,
            config=config,
            settings=settings,
            modules=modules,
            whole=whole,
            others=saved,
            base=settings.base,
            revision=settings.revision,
            notes=notes,
        )


def _modules(
    tensors: list[TensorRef], prefix: str, facts: MethodFacts, method: TunerMethod
) -> tuple[tuple[Module, ...], list[TensorRef]]:
    """The adapted layers, and the tensors that belong to none."""
    key = re.compile(rf"(?P<path>.+?)\.(?P<part>{re.escape(facts.prefix)}.+)")
    parts: dict[str, dict[str, TensorRef]] = defaultdict(dict)
    others = []
    for ref in tensors:
        match = key.fullmatch(ref.name.removeprefix(prefix))
        if match is None:
            others.append(ref)
        else:
            parts[match["path"]][match["part"]] = ref
    modules = (
        _module(path, method, parts[path], _rank(parts[path], facts, method.config))
        for path in sorted(parts, key=natural_order)
    )
    return tuple(modules), others


def _scalars(tensors: list[TensorRef]) -> tuple[dict[str, TensorRef], list[TensorRef]]:
    """The scalars of MAP by name, and the rest."""
    found = {ref.name: ref for ref in tensors if ref.name.rpartition(".")[2] in SCALAR_NAMES}
    return found, [ref for ref in tensors if ref.name not in found]


def _with_scalars(
    modules: tuple[Module, ...], prefix: str, scalars: dict[str, TensorRef], file: Path
) -> tuple[Module, ...]:
    """Every module with its own two."""
    result = []
    with TensorReader() as reader:
        for module in modules:
            values = []
            for name in SCALAR_NAMES:
                ref = scalars.pop(f"{prefix}{module.path}.{name}", None)
                value = None if ref is None or ref.numel != 1 else float(reader.read(ref))
                if value is None or not math.isfinite(value):
                    raise AdapterError(f"{file}: {module.path} has no finite {name}, one number, beside its tensors.")
                values.append(value)
            result.append(replace(module, map_scalars=(values[0], values[1])))
    if scalars:
        raise AdapterError(f"{file}: {next(iter(scalars))} belongs to a layer that has no other tensors.")
    return tuple(result)


def _module(path: str, method: TunerMethod, own: Mapping[str, TensorRef], rank: int) -> Module:
    """A layer that is not yet placed: its factors, no bytes of a file, have no dimensions before."""
    like = next((ref for ref in own.values() if ref.dtype in ("F32", "F16", "BF16")), next(iter(own.values())))
    none = replace(like, name=f"{path}.lora_A.weight", shape=(0, 0), start=0)
    return Module(path, rank, 1.0, none, none, method=method, own=tuple(own.items()))


def _rank(own: Mapping[str, TensorRef], facts: MethodFacts, config: Mapping[str, Any]) -> int:
    """The rank that a module's update has at most, or 0 where that is the weight's own."""
    if facts.rank is None:
        return 0
    try:
        rank = facts.rank({name: ref.shape for name, ref in own.items()}, config)
    except (KeyError, IndexError, ValueError):
        ref = next(iter(own.values()))
        raise AdapterError(
            f"{ref.file}: the tensors beside {ref.name} are not those of a {facts.name} layer: it is incomplete."
        ) from None
    return rank if type(rank) is int and rank > 0 else 0
