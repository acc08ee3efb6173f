"""MAP directories: a PEFT adapter that stock PEFT loads, with the scalars beside it in ``map_config.json``.

The stored factors hold D = (b/a)·Δ, so that W' = a·(W0 + D) is at once a DoRA adapter with magnitude a·‖W0 + D‖_row,
and for a = 1 a plain LoRA adapter (MATH.md section 6). For the direction ``dora`` the factors and the magnitude are the
source's own, and the scalars multiply T − W0.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mapconv.adapter import Adapter, MapModule, Module
from mapconv.checkpoint.staging import write_file
from mapconv.errors import AdapterError
from mapconv.formats.config import parse_settings, read_config
from mapconv.formats.peft import CONFIG_FILE, read_modules

MAP_CONFIG_FILE = "map_config.json"
FORMAT_VERSION = 1


class MapDirectory:
    """The dialect that ``mapconv upgrade`` writes."""

    def detect(self, path: Path) -> bool:
        return (path / MAP_CONFIG_FILE).is_file() and (path / CONFIG_FILE).is_file()

    def read(self, path: Path) -> Adapter:
        map_config = read_config(path / MAP_CONFIG_FILE)
        config = read_config(path / CONFIG_FILE)
        settings = parse_settings(config, path / CONFIG_FILE)
        version = map_config.get("format_version")
        if version != FORMAT_VERSION:
            raise AdapterError(
                f"{path / MAP_CONFIG_FILE} has format_version {version!r}, expected {FORMAT_VERSION}: "
                "it was written by another version of mapconv."
            )
        modules = read_modules(path, settings)
        map_modules = _read_map_modules(map_config, path / MAP_CONFIG_FILE)
        for module in modules:
            if module.path not in map_modules:
                raise AdapterError(f"{path / MAP_CONFIG_FILE} has no entry for module {module.path}.")
        for module_path in map_modules.keys() - {module.path for module in modules}:
            raise AdapterError(f"{path / MAP_CONFIG_FILE} names module {module_path}, which has no tensors.")
        ordered = tuple(map_modules[module.path] for module in modules)
        return Adapter(
            path=path,
            method="MAP",
            config=config,
            modules=tuple(_own_form(module, scalars) for module, scalars in zip(modules, ordered, strict=True)),
            base=settings.base,
            revision=settings.revision,
            map_modules=ordered,
            map_config=map_config,
        )


def peft_config(source: Mapping[str, Any], modules: Sequence[MapModule], *, base: str | None) -> dict[str, Any]:
    """The ``adapter_config.json`` under which stock PEFT computes the MAP adapter: the source's targets, scaling 1."""
    rank = Counter(module.rank for module in modules).most_common(1)[0][0]
    # Longest path first: PEFT takes the first pattern that matches a path's *end*.
    others = sorted((m for m in modules if m.rank != rank), key=lambda m: (-len(m.path), m.path))
    ranks = {module.path: module.rank for module in others}
    return dict(source) | {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": ranks,
        "alpha_pattern": dict(ranks),
        "use_rslora": False,
        "use_dora": needs_magnitude(modules),
        "init_lora_weights": True,
    }


def needs_magnitude(modules: Sequence[MapModule]) -> bool:
    """Whether stock PEFT needs DoRA's magnitude to compute these modules: any gain but 1, or DoRA's own direction."""
    return any(module.direction == "dora" or module.base_gain != 1.0 for module in modules)


def write_configs(folder: Path, config: Mapping[str, Any], map_config: Mapping[str, Any]) -> None:
    """Write both configurations; ``map_config.json``, which makes the folder a MAP directory, comes last."""
    write_file(folder / CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True) + "\n")
    write_file(folder / MAP_CONFIG_FILE, json.dumps(map_config, indent=2) + "\n")


def _own_form(module: Module, scalars: MapModule) -> Module:
    """The module as MAP computes it: a low-rank direction has gains in place of the magnitude that PEFT needs."""
    return module if scalars.direction == "dora" else replace(module, magnitude=None)


def _read_map_modules(map_config: Mapping[str, Any], path: Path) -> dict[str, MapModule]:
    entries = map_config.get("modules")
    if not isinstance(entries, list) or not entries:
        raise AdapterError(f"{path} has no list of modules.")
    modules: dict[str, MapModule] = {}
    for entry in entries:
        try:
            module = MapModule(
                path=str(entry["path"]),
                direction=entry["direction"],
                rank=int(entry["rank"]),
                **{name: float(entry[name]) for name in ("alpha", "beta", "base_norm", "direction_norm", "error")},
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise AdapterError(f"{path} has a module entry that cannot be read ({error!r}).") from None
        numbers = (module.alpha, module.beta, module.base_gain, module.update_gain, module.error)
        if not all(map(math.isfinite, numbers)):
            raise AdapterError(f"{path}: module {module.path} has a scalar that is not finite.")
        if module.direction not in ("low-rank", "dora"):
            raise AdapterError(f"{path}: module {module.path} has direction {module.direction!r}.")
        modules[module.path] = module
    return modules
