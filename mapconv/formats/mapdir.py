"""MAP directories: a PEFT adapter that stock PEFT loads, with the scalars beside it in ``map_config.json``.

The stored factors hold D = (b/a)·Δ, so that W' = a·(W0 + D) is at once a DoRA adapter with magnitude a·‖W0 + D‖_row,
and for a = 1 a plain LoRA adapter (``mapconv.algebra`` section 6). For the direction ``dora`` the factors and the
magnitude are the source's own, and the scalars multiply T − W0.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mapconv.adapter import Adapter, MapModule, Module
from mapconv.checkpoint.staging import write_file
from mapconv.errors import AdapterError
from mapconv.files import LARGE
from mapconv.formats.base import CONFIG_FILE, Found
from mapconv.formats.peft import KEY_PREFIX, PeftDirectory
from mapconv.jsonfile import read_object
from mapconv.untrusted.schema import COUNT, NULL, NUMBER, TABLE, TEXT, Each, fault, shown

MAP_CONFIG_FILE = "map_config.json"
FORMAT_VERSION = 1
#: Numbers of a module's entry that need not have been measured.
_MEASURED = ("error", "output_error", "alpha_before", "beta_before", "error_before", "base_projection")

_TEXT, _NUMBER, _COUNT = (TEXT, NULL), (NUMBER, NULL), (COUNT, NULL)
#: An adapter that a result was made from, and what that was made from in its turn.
_SOURCE: dict[str, Any] = {
    **dict.fromkeys(("name", "revision", "method", "fingerprint"), _TEXT),
    "card": (TABLE, NULL),
}
_SOURCE["source"] = (_SOURCE, NULL)
_MODULE = {
    **dict.fromkeys(("path", "direction"), TEXT),
    "rank": COUNT,
    "expert": _COUNT,
    **dict.fromkeys(("alpha", "beta", "base_norm", "direction_norm"), NUMBER),
    **dict.fromkeys(_MEASURED, _NUMBER),
    **dict.fromkeys(("base_tensor", "base_dtype"), _TEXT),
    "base_shape": ([COUNT], NULL),
}
_CALIBRATION = {
    "models": Each(dict.fromkeys(("perplexity", "kl", "top1_agreement"), _NUMBER)),
    **dict.fromkeys(("train", "objective"), TEXT),
    **dict.fromkeys(("trained_parameters", "steps", "best_step", "held_out_positions"), COUNT),
}
#: What an adapter is worth on another base than its source's (``mapconv.fidelity.served``).
SERVED = {
    "positions": COUNT,
    **dict.fromkeys(
        ("source", "alone", "as_is", "rebased"), dict.fromkeys(("kl", "top1_agreement", "perplexity"), _NUMBER)
    ),
}
_REBASE = {
    "from": dict.fromkeys(("name", "revision"), _TEXT),
    "modules": [{"path": TEXT, "expert": _COUNT, "base_change": _NUMBER, "output_error_before": _NUMBER}],
    "served": (SERVED, NULL),
}
_SURVIVAL = dict.fromkeys(("changed", "projection", "error"), NUMBER)
_RECORD = {
    "mapconv_version": _TEXT,
    "base": {**dict.fromkeys(("name", "revision", "fingerprint"), _TEXT), "card": (TABLE, NULL)},
    "source": (_SOURCE, NULL),
    "more_sources": ([_SOURCE], NULL),
    "options": (TABLE, NULL),
    "data": (TABLE, NULL),
    "calibration": (_CALIBRATION, NULL),
    "rebase": (_REBASE, NULL),
    "survival": (_SURVIVAL | {"tensors": [_SURVIVAL | {"tensor": TEXT, "modules": [TEXT], "dtype": TEXT}]}, NULL),
    "modules": [_MODULE],
}


class MapDirectory:
    """The dialect that ``mapconv upgrade`` writes."""

    def recognise(self, found: Found) -> bool:
        return (found.path / MAP_CONFIG_FILE).is_file() and found.config is not None

    def read(self, found: Found, *, allow_pickle: bool = False) -> Adapter:
        path = found.path
        map_config = read_record(path / MAP_CONFIG_FILE)
        adapter = PeftDirectory().read(found, allow_pickle=allow_pickle)
        scalars = map_modules(map_config, path / MAP_CONFIG_FILE)
        if not scalars:
            raise AdapterError(f"{path / MAP_CONFIG_FILE} has no modules: make the folder again.")
        directions = {module.path: module.direction for module in scalars}
        for module in adapter.modules:
            if module.path not in directions:
                raise AdapterError(f"{path / MAP_CONFIG_FILE} has no entry for module {module.path}.")
        for module_path in directions.keys() - {module.path for module in adapter.modules}:
            raise AdapterError(f"{path / MAP_CONFIG_FILE} names module {module_path}, which has no tensors.")
        return replace(
            adapter,
            method="MAP",
            # A low-rank direction has gains in place of the magnitude that PEFT needs to compute it.
            modules=tuple(m if directions[m.path] == "dora" else replace(m, magnitude=None) for m in adapter.modules),
            notes=(),
            map_modules=scalars,
            map_config=map_config,
        )


def peft_config(
    source: Mapping[str, Any],
    modules: Sequence[MapModule],
    pattern_names: Mapping[str, str],
    *,
    base: str | None,
    respelled: bool = False,
) -> dict[str, Any]:
    """The ``adapter_config.json`` under which stock PEFT computes the MAP adapter: the source's targets, scaling 1.

    ``pattern_names`` has the name by which PEFT looks up a module's rank: its path, or the parameter's for experts.
    ``respelled`` modules have other paths than the source's targets say: then every module is named in full.
    """
    ranks = {pattern_names[module.path]: module.rank for module in modules}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    # Longest path first: PEFT takes the first pattern that matches a path's *end*.
    others = dict(
        sorted((item for item in ranks.items() if item[1] != rank), key=lambda item: (-len(item[0]), item[0]))
    )
    targets: dict[str, Any] = {}
    if respelled:
        targets = dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
        # A stack of experts is a parameter, which target_parameters names.
        targets["target_modules"] = [m.path for m in modules if pattern_names[m.path] == m.path]
    return (
        dict(source)
        | targets
        | {
            "peft_type": "LORA",
            "base_model_name_or_path": base,
            "inference_mode": True,
            "r": rank,
            "lora_alpha": rank,
            "rank_pattern": others,
            "alpha_pattern": dict(others),
            "use_rslora": False,
            "use_dora": needs_magnitude(modules),
            "init_lora_weights": True,
        }
    )


def lora_settings_of(config: Mapping[str, Any], *, own_biases: bool) -> dict[str, Any]:
    """What remains of another method's configuration in that of its conversion to factors.

    ``own_biases`` are written for adapted layers, in the place of the base's.
    """
    kept = ("task_type", "auto_mapping", "modules_to_save", "trainable_token_indices")
    bias = config.get("bias") or "none"
    if bias != "all" and (own_biases or str(bias).endswith("_only")):
        bias = "lora_only"
    return {name: config[name] for name in kept if name in config} | {"bias": bias}


def peft_factors(module: Module, A: torch.Tensor, B: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """Keys and tensors of one module's factors, from matrices back to the shapes that PEFT gives its layer."""
    shapes = factor_shapes(module, A.shape[0], *B.shape)
    return [(name, factor.reshape(shape)) for (name, shape), factor in zip(shapes, (A, B), strict=True)]


def factor_shapes(module: Module, rows: int, height: int, columns: int) -> list[tuple[str, tuple[int, ...]]]:
    """Key and shape of each factor as it is stored: ``rows`` of A, and B of (``height``, ``columns``)."""
    prefix, shape = f"{KEY_PREFIX}{module.path}", module.lora_A.shape
    name_A, name_B = (
        ("lora_embedding_A", "lora_embedding_B") if module.embedding else ("lora_A.weight", "lora_B.weight")
    )
    return [
        (f"{prefix}.{name_A}", (rows, *shape[1:])),
        (f"{prefix}.{name_B}", (height, columns, *(1 for _ in shape[2:]))),
    ]


def peft_magnitude(module: Module, magnitude: torch.Tensor) -> tuple[str, torch.Tensor]:
    """Key and tensor of a module's magnitude: (out,), or (1, out, 1, …) for a convolution."""
    kernel = module.lora_A.shape[2:]
    shape = (1, magnitude.numel(), *(1 for _ in kernel)) if kernel else (magnitude.numel(),)
    return f"{KEY_PREFIX}{module.path}.lora_magnitude_vector", magnitude.reshape(shape)


def needs_magnitude(modules: Sequence[MapModule]) -> bool:
    """Whether stock PEFT needs DoRA's magnitude to compute these modules: any gain but 1, or DoRA's own direction."""
    return any(module.direction == "dora" or module.base_gain != 1.0 for module in modules)


def write_configs(folder: Path, config: Mapping[str, Any], map_config: Mapping[str, Any]) -> None:
    """Write both configurations; ``map_config.json``, which makes the folder a MAP directory, comes last."""
    write_file(folder / CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True) + "\n")
    write_file(folder / MAP_CONFIG_FILE, _with_rows(map_config))


def _with_rows(table: Mapping[str, Any]) -> str:
    """JSON to be read by people, with each element of a list on one line: hundreds of modules are a table."""
    parts = []
    for key, value in table.items():
        if isinstance(value, list) and value:
            rows = ",\n".join(f"    {json.dumps(row)}" for row in value)
            parts.append(f"  {json.dumps(key)}: [\n{rows}\n  ]")
        else:
            text = json.dumps(value, indent=2).replace("\n", "\n  ")
            parts.append(f"  {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def read_record(path: Path, *, advice: str = "make the folder again") -> dict[str, Any]:
    """A ``map_config.json``, or the ``map_merge.json`` of a merged model, with every field of its type.

    Raises:
        AdapterError: absent, broken, or written by another version.
    """
    try:
        record = read_object(path, AdapterError, advice=advice, limit=LARGE)  # it lists every module
    except FileNotFoundError:
        raise AdapterError(f"{path} is missing: {advice}.") from None
    version = record.get("format_version")
    if version != FORMAT_VERSION:
        raise AdapterError(
            f"{path} has format_version {shown(version)}, expected {FORMAT_VERSION}: it was written by another version "
            "of mapconv."
        )
    wrong = fault(record, _RECORD)
    if wrong is not None:
        raise AdapterError(f"{path}: {wrong}: {advice}.")
    return record


def map_modules(record: Mapping[str, Any], path: Path) -> tuple[MapModule, ...]:
    """The modules of a record that ``read_record`` has read from ``path``.

    Raises:
        AdapterError: a scalar out of float64's range, or a direction that there is not.
    """
    modules = []
    for entry in record["modules"]:
        scalars: dict[str, Any] = {
            name: float(entry[name]) for name in ("alpha", "beta", "base_norm", "direction_norm")
        }
        scalars |= {name: None if entry.get(name) is None else float(entry[name]) for name in _MEASURED}
        module = MapModule(
            path=entry["path"],
            direction=entry["direction"],
            rank=entry["rank"],
            expert=entry.get("expert"),
            **scalars,
        )
        if not math.isfinite(module.base_gain) or not math.isfinite(module.update_gain):
            raise AdapterError(f"{path}: module {module.path} has a scalar that is not finite.")
        if module.direction not in ("low-rank", "dora"):
            raise AdapterError(f"{path}: module {module.path} has direction {module.direction!r}.")
        modules.append(module)
    return tuple(modules)
