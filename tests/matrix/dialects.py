"""Rewrites of a saved adapter into the spelling of another tool, another version or another file format.

Each takes the model, the adapter's folder and the base's folder, and changes the files in place; what the adapter
means stays the same, so that the oracle is the adapter before the rewrite.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from .tiny import Tiny

PREFIX = "base_model.model."
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PART = re.compile(r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.weight|\.bias)?")
Rewrite = Callable[[Tiny, Path, Path], None]


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG).read_text())


def write_config(folder: Path, config: dict[str, Any]) -> None:
    (folder / CONFIG).write_text(json.dumps(config, indent=2))


def adapter_name_in_keys(name: str) -> Rewrite:
    """``….lora_A.default.weight``: a ``state_dict()`` saved as it is, as several trainers' checkpoints hold it."""

    def rewrite(tiny: Tiny, folder: Path, base: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        renamed = {}
        for key, value in tensors.items():
            match = _PART.fullmatch(key)
            if match is None:  # a whole tensor: PEFT's live name is ….modules_to_save.<adapter>.weight
                path, _, leaf = key.rpartition(".")
                renamed[f"{path}.modules_to_save.{name}.{leaf}"] = value
            elif match[2] == "lora_magnitude_vector":
                renamed[f"{match[1]}.{match[2]}.{name}.weight"] = value
            else:
                renamed[f"{match[1]}.{match[2]}.{name}{match[3] or ''}"] = value
        save_file(renamed, folder / WEIGHTS)

    return rewrite


def peft_0_3(tiny: Tiny, folder: Path, base: Path) -> None:
    """The configuration of PEFT 0.3: a third of today's fields, a null that nobody reads, another disk's base path."""
    config = read_config(folder)
    old = (
        "bias",
        "fan_in_fan_out",
        "inference_mode",
        "lora_alpha",
        "lora_dropout",
        "modules_to_save",
        "peft_type",
        "r",
    )
    kept = {name: config[name] for name in (*old, "target_modules", "task_type")}
    write_config(folder, kept | {"enable_lora": None, "base_model_name_or_path": "/home/somebody/models/base"})


def fields_of_other_tools(tiny: Tiny, folder: Path, base: Path) -> None:
    """Fields that unsloth, LLaMA-Factory and future versions of PEFT add, all without effect on the weights."""
    config = read_config(folder)
    config |= {
        "auto_mapping": {
            "base_model_class": tiny.model_class,
            "parent_library": "transformers",
            "unsloth_fixed": True,
        },
        "megatron_core": "megatron.core",
        "peft_version": "0.99.0",
        "loftq_config": {},
    }
    write_config(folder, config)


def pickled(tiny: Tiny, folder: Path, base: Path) -> None:
    """``adapter_model.bin``, as PEFT before 0.5 and ``safe_serialization=False`` write it."""
    tensors = load_file(folder / WEIGHTS)
    torch.save(tensors, folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def map_authors(tiny: Tiny, folder: Path, base: Path) -> None:
    """As the authors' fork of PEFT writes it: at α = ‖W0‖ and β = s‖BA‖ their formula is the LoRA that it was."""
    weights, config = tiny.build().state_dict(), read_config(folder)
    tensors = load_file(folder / WEIGHTS)
    for key, A in list(tensors.items()):
        path, found, _ = key.partition(".lora_A")
        if found:
            update = config["lora_alpha"] / config["r"] * tensors[f"{path}.lora_B.weight"].double() @ A.double()
            weight = weights[f"{path.removeprefix(PREFIX)}.weight"]
            tensors |= {f"{path}.map_alpha": weight.double().norm(), f"{path}.map_beta": update.norm()}
    save_file({key: value.float() for key, value in tensors.items()}, folder / WEIGHTS)
    write_config(folder, config | {"use_map": True, "map_eps": 1e-6, "map_norm_scope": "global", "map_beta_init": 1.0})


def version_4_names(tiny: Tiny, folder: Path, base: Path) -> None:
    """Keys and targets as transformers 4 named the modules of vision and vision-language models.

    The old names are those that transformers writes to disk by default; live and stored names are paired by value,
    which needs no list of our own (every weight of these models is random, hence unlike any other).
    """
    model = tiny.build()
    old_folder = folder.parent / f"{folder.name}-names"
    model.save_pretrained(old_folder)
    stored = load_file(old_folder / "model.safetensors")
    old_path = {}
    for live_name, live in model.state_dict().items():
        twins = [name for name, value in stored.items() if value.shape == live.shape and torch.equal(value, live)]
        if live_name.endswith(".weight") and len(twins) == 1:
            old_path[live_name.removesuffix(".weight")] = twins[0].removesuffix(".weight")
    tensors, targets = {}, set()
    for key, value in load_file(folder / WEIGHTS).items():
        match = _PART.fullmatch(key.removeprefix(PREFIX))
        if match is None:  # a whole tensor
            path, _, leaf = key.removeprefix(PREFIX).rpartition(".")
            tensors[f"{PREFIX}{old_path[path]}.{leaf}"] = value
            continue
        path = old_path[match[1]]
        targets.add(path)
        tensors[f"{PREFIX}{path}.{match[2]}{match[3] or ''}"] = value
    save_file(tensors, folder / WEIGHTS)
    write_config(folder, read_config(folder) | {"target_modules": sorted(targets)})


def version_4_experts(tiny: Tiny, folder: Path, base: Path) -> None:
    """One LoRA for each projection of each expert, as adapters of Mixtral and Qwen-MoE were saved until 2025.

    Written from scratch, keeping the attention's factors: a stacked adapter has entries that no per-expert one has.
    """
    stored = load_file(base / "model.safetensors")
    tensors = {key: value for key, value in load_file(folder / WEIGHTS).items() if ".experts." not in key}
    config = read_config(folder)
    generator = torch.Generator().manual_seed(21)
    rank, targets = config["r"], set(config["target_modules"])
    for name, weight in sorted(stored.items()):
        if ".experts." in name:
            path = name.removesuffix(".weight")
            targets.add(path.rpartition(".")[2])
            shapes = {"lora_A": (rank, weight.shape[1]), "lora_B": (weight.shape[0], rank)}
            for part, shape in shapes.items():
                tensors[f"{PREFIX}{path}.{part}.weight"] = 0.2 * torch.randn(shape, generator=generator)
    save_file(tensors, folder / WEIGHTS)
    unused = {"rank_pattern": {}, "alpha_pattern": {}, "target_parameters": None}
    write_config(folder, config | unused | {"target_modules": sorted(targets)})
