"""PEFT folders: as stock PEFT reads them, or in the narrower form that a server reads."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mapconv.checkpoint.reader import TensorReader
from mapconv.checkpoint.sidecars import copy_tokenizer
from mapconv.checkpoint.staging import write_file
from mapconv.checkpoint.writer import SpooledFile, TensorSpec
from mapconv.exporting.plain import Export, PlainModule
from mapconv.exporting.stacks import apart, stack_names
from mapconv.formats.base import CONFIG_FILE, WEIGHTS_FILE
from mapconv.formats.mapdir import peft_config, peft_factors, peft_magnitude
from mapconv.formats.peft import KEY_PREFIX


def write_peft(export: Export, out: Path) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``.

    With one rank the configuration is what every server reads alike: ``lora_alpha = r``, no patterns, and the ends of
    module names in a list.
    """
    file = SpooledFile(out / WEIGHTS_FILE)
    try:
        modules, stacks = apart(export)
        for stack in _stacks(modules):
            factors = _side_by_side([export.factors(module) for module in stack])
            for name, tensor in peft_factors(stack[0].placed.module, *factors):
                file.append(name, tensor)
        for path, A, B in stacks:
            file.append(f"{KEY_PREFIX}{path}.lora_A.weight", A)
            file.append(f"{KEY_PREFIX}{path}.lora_B.weight", B)
        _append_rest(export, file)
        file.finish()
    finally:
        file.close()
    copy_tokenizer(export.placed.adapter.path, out)
    config = _stock_config(export) if export.rank is None else _server_config(export, export.rank)
    write_file(out / CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True) + "\n")


def _append_rest(export: Export, file: SpooledFile) -> None:
    """Magnitudes, the layers' own biases, and whole tensors."""
    for module in export.modules:
        magnitude = export.magnitude(module)
        if magnitude is not None:
            file.append(*peft_magnitude(module.placed.module, magnitude))
    with TensorReader() as reader:
        for item in {module.path: module.placed for module in export.modules}.values():
            if item.module.bias is not None:
                file.append(
                    f"{KEY_PREFIX}{item.module.path}.lora_B.bias", reader.read(item.module.bias).float() * item.scaling
                )
        for name, ref in export.placed.adapter.others.items():
            file.append_blocks(TensorSpec(name, reader.dtype_of(ref), ref.shape), reader.blocks(ref))


def _stock_config(export: Export) -> dict[str, Any]:
    adapter = export.placed.adapter
    names = {
        module.path: module.placed.parameter if module.placed.experts > 1 else module.path for module in export.modules
    }
    own = {module.path for module in adapter.modules}
    respelled = adapter.settings.by_module or any(module.path not in own for module in export.modules)
    scalars = [module.scalars for module in export.modules]
    config = peft_config(adapter.config, scalars, names, base=export.base, respelled=respelled)
    return config | {"use_dora": _is_dora(export), "revision": adapter.revision}


def _server_config(export: Export, rank: int) -> dict[str, Any]:
    """All that a server reads, and nothing that one of them would refuse."""
    source: Mapping[str, Any] = export.placed.adapter.config
    return {
        "peft_type": "LORA",
        "task_type": source.get("task_type"),
        "base_model_name_or_path": export.base,
        "revision": export.placed.adapter.revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": _targets(export),
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": sorted(export.placed.adapter.settings.modules_to_save) or None,
        "fan_in_fan_out": bool(source.get("fan_in_fan_out")),
        "use_rslora": False,
        "use_dora": _is_dora(export),
        "init_lora_weights": True,
    }


def _targets(export: Export) -> list[str] | str:
    """The last parts of the modules' names, where those select these modules alone; else the whole names."""
    if export.experts == "tinker":
        return "all-linear"
    experts = {module.path for module in export.modules if _is_expert(module.path)}
    paths = {module.path for module in export.modules} - experts
    leaves = {path.rpartition(".")[2] for path in paths}
    weights = [name.removesuffix(".weight") for name in export.placed.target.tensors if name.endswith(".weight")]
    selected = sum(name.rpartition(".")[2] in leaves for name in weights if not _is_expert(name))
    named = set(stack_names(export)) or export.leaves or experts
    return sorted((leaves if selected == len(paths) else paths) | (named if experts else set()))


def _is_expert(path: str) -> bool:
    """Whether a module is a projection of one expert among others."""
    return re.search(r"\.experts\.[0-9]+\.", path) is not None


def _is_dora(export: Export) -> bool:
    return any(module.magnitude is not None for module in export.modules)


def _stacks(modules: Sequence[PlainModule]) -> list[list[PlainModule]]:
    """The experts of one stacked parameter together; any other module alone."""
    stacks: dict[str, list[PlainModule]] = defaultdict(list)
    for module in modules:
        stacks[module.path].append(module)
    return list(stacks.values())


def _side_by_side(stack: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of a stack: A has the experts in turn, B side by side, with the expert counting fastest."""
    if len(stack) == 1:
        return stack[0]
    return torch.cat([A for A, _ in stack]), torch.stack([B for _, B in stack], dim=2).flatten(1)
