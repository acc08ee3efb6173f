"""The files of image adapters: kohya's and ComfyUI's single file, and the folder that diffusers loads."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from mapconv.checkpoint.writer import TensorSpec, lay_out
from mapconv.exporting.imagenames import Key, comfyui_names, diffusers_names, kohya_names
from mapconv.exporting.plain import Export, PlainModule

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
_Entry = tuple[TensorSpec, PlainModule, str]


def write_kohya(export: Export, out: Path) -> None:
    """Write ``….lora_down.weight``, ``….lora_up.weight`` and ``….alpha``; with alpha = r the scaling is in ``up``."""
    ranks = {module.rank for module in export.modules}
    rank = str(max(ranks)) if len(ranks) == 1 else "Dynamic"
    metadata = {"ss_network_module": "networks.lora", "ss_network_dim": rank, "ss_network_alpha": rank}
    _write(export, out, kohya_names(export.placed), ("lora_down.weight", "lora_up.weight", "alpha"), metadata)


def write_comfyui(export: Export, out: Path) -> None:
    """Write the parts by kohya's endings, under the names that ComfyUI looks up."""
    _write(export, out, comfyui_names(export.placed), ("lora_down.weight", "lora_up.weight", "alpha"), {"format": "pt"})


def write_diffusers(export: Export, out: Path) -> None:
    """Write PEFT's parts behind each model's name, with PEFT's settings of each in the header."""
    names = diffusers_names(export.placed)
    settings: dict[str, object] = {}
    ranks: dict[str, dict[str, int]] = {}
    for module in export.modules:
        model, _, path = names[module.placed.key].partition(".")
        ranks.setdefault(model, {})[path] = module.rank
    for model, table in ranks.items():
        rank = max(table.values())
        others = {path: own for path, own in table.items() if own != rank}
        settings |= {
            f"{model}.r": rank,
            f"{model}.lora_alpha": rank,
            f"{model}.rank_pattern": others,
            f"{model}.alpha_pattern": others,
            f"{model}.target_modules": sorted(table),
            f"{model}.use_dora": any(module.magnitude is not None for module in export.modules),
            f"{model}.lora_bias": False,
        }
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(settings, indent=2, sort_keys=True)}
    parts = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    _write(export, out / DIFFUSERS_FILE, names, parts, metadata)


def _write(
    export: Export, out: Path, names: Mapping[Key, str], endings: tuple[str, str, str], metadata: dict[str, str]
) -> None:
    entries = list(_entries(export, names, endings))
    header, _ = lay_out(out, [spec for spec, _, _ in entries], metadata)
    with open(out, "xb") as file:
        file.write(header)
        for spec, module, ending in entries:
            file.write(_value(export, module, endings.index(ending), spec.shape))


def _entries(export: Export, names: Mapping[Key, str], endings: tuple[str, str, str]) -> Iterator[_Entry]:
    for module in export.modules:
        name, kernel, rank = names[module.placed.key], module.kernel, export.rank or module.rank
        one = tuple(1 for _ in kernel)
        height = module.B.shape[0]
        shapes: list[tuple[int, ...]] = [(rank, module.inputs, *kernel), (height, rank, *one)]
        dtypes = [module.A.dtype, module.B.dtype]
        if endings[2] == "alpha":
            shapes, dtypes = [*shapes, ()], [*dtypes, "F32"]
        elif module.magnitude is not None:
            shapes = [*shapes, (1, height, *one) if kernel else (height,)]
            dtypes = [*dtypes, module.magnitude.dtype]
        for ending, dtype, shape in zip(endings, dtypes, shapes, strict=False):
            yield TensorSpec(f"{name}.{ending}", dtype, shape), module, ending


def _value(export: Export, module: PlainModule, place: int, shape: tuple[int, ...]) -> memoryview:
    if place < 2:
        tensor = export.factors(module)[place]
    else:
        magnitude = export.magnitude(module)
        tensor = torch.tensor(float(export.rank or module.rank)) if magnitude is None else magnitude
    return tensor.reshape(shape).contiguous().view(-1).view(torch.uint8).numpy().data
