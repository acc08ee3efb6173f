"""The adapters of MLX-LM: ``adapters.safetensors`` with ``adapter_config.json`` beside it.

``lora_a`` is (in, r), ``lora_b`` (r, out) and Δ = scale·(a·b)ᵀ; an embedding's are (tokens, r) and (r, width), those of
a stack of experts (E, r, in) and (E, out, r). A DoRA's ``m`` (out,) is PEFT's magnitude (``mlx_lm/tuner/lora.py``,
``dora.py``, ``utils.py``: ``load_adapters``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from mapconv.checkpoint.staging import write_file
from mapconv.checkpoint.writer import SpooledFile
from mapconv.exporting.plain import Export
from mapconv.exporting.stacks import apart
from mapconv.formats.base import CONFIG_FILE

#: A module of one of the model's layers, which MLX-LM names from the layer on; any other by its whole name.
_IN_LAYER = re.compile(r"(?:.+\.)?(?:layers|h|blocks)\.(?P<layer>\d+)\.(?P<name>.+)")


def write_mlx(export: Export, out: Path) -> None:
    """Write the folder that ``mlx_lm.generate --adapter-path`` takes."""
    assert export.rank is not None  # the format has one
    file = SpooledFile(out / "adapters.safetensors")
    try:
        modules, stacks = apart(export)
        for path, A, B in stacks:
            file.append(f"{path}.lora_a", A)
            file.append(f"{path}.lora_b", B)
        for module in modules:
            A, B = export.factors(module)
            file.append(f"{module.path}.lora_a", A.T)
            file.append(f"{module.path}.lora_b", B.T)
            magnitude = export.magnitude(module)
            if magnitude is not None:
                file.append(f"{module.path}.m", magnitude)
        file.finish()
    finally:
        file.close()
    names = [module.path for module in modules] + [path for path, *_ in stacks]
    config = {
        "model": export.base,
        "fine_tune_type": "dora" if export.modules[0].magnitude is not None else "lora",
        "num_layers": _layers(export.placed.target.tensors),
        # The scaling is in lora_b.
        "lora_parameters": {"rank": export.rank, "scale": 1.0, "dropout": 0.0, "keys": _keys(names)},
    }
    write_file(out / CONFIG_FILE, json.dumps(config, indent=2) + "\n")


def _layers(tensors: Iterable[str]) -> int:
    """All layers of the base: MLX-LM adapts as many from the end on, and leaves alone those without tensors of ours."""
    found = [int(match["layer"]) for match in map(_IN_LAYER.fullmatch, tensors) if match]
    return 1 + max(found, default=-1)


def _keys(names: Iterable[str]) -> list[str]:
    return sorted({match["name"] if (match := _IN_LAYER.fullmatch(name)) else name for name in names})
