"""The files of MAP's authors (LoMAP in their fork of PEFT): PEFT's own, with two scalars beside each module's factors.

W' = α·W/max(‖W‖, ε) + β·s·BA/max(‖s·BA‖, ε), with ``map_alpha`` and ``map_beta`` absolute numbers, ``map_eps`` (1e-6)
in the configuration, and s that of a LoRA. No release of PEFT computes it, so the formula is what results are held to.
Another spelling begins each of these names with ``lora_``; it is also in diffusers' files, which have no configuration.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mapconv.adapter import Adapter, Module, TensorRef
from mapconv.checkpoint.reader import TensorReader
from mapconv.errors import AdapterError, UnsupportedError
from mapconv.formats.base import CONFIG_FILE, Found
from mapconv.formats.config import parse_settings
from mapconv.formats.peft import KEY_PREFIX, peft_adapter, read_weights
from mapconv.spelling import AuthorsScalars
from mapconv.untrusted.schema import NUMBER, shown

_SCALAR = re.compile(r"(?P<path>.+)\.(?:lora_)?map_(?P<which>alpha|beta)(?:\.[^.]+)?")
#: Of the configuration: what says that this is LoMAP, what the formula needs, and what training alone needed.
_FIELDS = ("use_map", "map_eps", "map_norm_scope", "map_beta_init", "map_alpha_init", "map_detach_denom")
#: What their fork refuses, or has never combined with MAP.
_REFUSED = {
    "fan_in_fan_out": "their formula is that of weights which are stored (out, in)",
    "enable_lora": "MAP on a part of a fused layer has no one norm",
    "use_delora": "DeLoRA bounds the update by a norm of its own",
    "use_dora": "DoRA rescales the rows of what MAP has made",
}
EPS = 1e-6


class LomapDirectory:
    """The dialect that the authors' fork of PEFT writes."""

    def recognise(self, found: Found) -> bool:
        if found.config is None or "peft_type" not in found.config:
            return False
        if uses_map(found.config):
            return True
        return found.header is not None and any(_SCALAR.fullmatch(ref.name) for ref in found.header.tensors)

    def read(self, found: Found, *, allow_pickle: bool = False) -> Adapter:
        path, config = found.path, dict(found.config or {})
        place = path / CONFIG_FILE
        eps = floor_of(config, place)
        plain = without_map(config)
        settings = parse_settings(plain, place)
        refs = read_weights(found, allow_pickle=allow_pickle)
        found_scalars, rest = _apart(refs)
        if not uses_map(config):
            ref = next(ref for own in found_scalars.values() for ref in own.values())
            raise AdapterError(
                f"{place} does not say use_map, but {ref.name} is a scalar of MAP: take "
                "both files from one training run."
            )
        adapter = peft_adapter(found, settings, rest)
        for name in ("init_lora_weights", "target_parameters", "layer_replication", "lora_bias"):
            if config.get(name) and (name != "init_lora_weights" or settings.initialization):
                raise UnsupportedError(
                    f"{place}: use_map together with {name}={shown(config[name])} is nothing that MAP's authors train."
                )
        paths = [module.path for module in adapter.modules]
        with TensorReader() as reader:
            scalars = tuple(
                scalars_of(module, found_scalars.get(module.path, {}), eps, reader) for module in adapter.modules
            )
        for name in found_scalars.keys() - set(paths):
            for ref in found_scalars[name].values():
                raise AdapterError(f"{ref.file}: {ref.name} belongs to a module that has no factors.")
        return replace(adapter, method="LoMAP", config=plain, authors_scalars=scalars, dialect="MAP's authors")


def uses_map(config: Mapping[str, Any]) -> bool:
    """Whether an ``adapter_config.json`` says that its adapter is LoMAP."""
    return bool(config.get("use_map") or config.get("lora_use_map"))


def without_map(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of the LoRA alone."""
    return {name: value for name, value in config.items() if name.removeprefix("lora_") not in _FIELDS}


def floor_of(config: Mapping[str, Any], place: Path) -> float:
    """The floor under both norms, once the configuration is one of the formula."""
    for name, reason in _REFUSED.items():
        if config.get(name):
            raise UnsupportedError(f"{place}: use_map together with {name}={shown(config[name])}: {reason}.")
    scope = _field(config, "map_norm_scope", "global")
    if scope != "global":
        raise UnsupportedError(
            f"{place}: map_norm_scope is {shown(scope)}, whose norms are one for each row or column, which moves the "
            "base weight itself: only global is MAP. (One version of the authors' program wrote this field and did "
            "nothing with it: if yours did, write global there.)"
        )
    eps = _field(config, "map_eps", EPS)
    if not NUMBER.holds(eps) or not eps >= 0:
        raise AdapterError(f"{place}: map_eps is {shown(eps)}, expected a number from 0 up.")
    return float(eps)


def _field(config: Mapping[str, Any], name: str, default: Any) -> Any:
    value = config.get(name, config.get(f"lora_{name}"))
    return default if value is None else value


def _apart(refs: tuple[TensorRef, ...]) -> tuple[dict[str, dict[str, TensorRef]], tuple[TensorRef, ...]]:
    """The scalars by module and name, and all other tensors."""
    scalars: dict[str, dict[str, TensorRef]] = defaultdict(dict)
    rest = []
    for ref in refs:
        match = _SCALAR.fullmatch(ref.name)
        if match is None:
            rest.append(ref)
            continue
        own, which = scalars[match["path"].removeprefix(KEY_PREFIX)], match["which"]
        if which in own:
            raise AdapterError(f"{ref.file}: {ref.name} and {own[which].name} are the same scalar of one module.")
        own[which] = ref
    return scalars, tuple(rest)


def scalars_of(module: Module, found: Mapping[str, TensorRef], eps: float, reader: TensorReader) -> AuthorsScalars:
    """A module's two scalars, ``found`` by the names ``alpha`` and ``beta``.

    Raises:
        AdapterError: one is missing, not one number, or not finite.
    """
    values = {}
    for which in ("alpha", "beta"):
        ref = found.get(which)
        if ref is None:
            raise AdapterError(
                f"{module.lora_A.file}: module {module.path} has no map_{which}, but the adapter is one of MAP's "
                "authors."
            )
        if ref.numel != 1:
            raise AdapterError(
                f"{ref.file}: {ref.name} is {list(ref.shape)}, expected one number (more of them belong to a "
                "map_norm_scope that is not MAP)."
            )
        value = float(reader.read(ref).double())
        if not abs(value) < float("inf"):
            raise AdapterError(f"{ref.file}: {ref.name} is {value}, expected a number.")
        values[which] = value
    return AuthorsScalars(module.lora_A.name, values["alpha"], values["beta"], eps)
