"""What a MAP directory records of where it came from: its base, its source, its options."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mapconv
from mapconv.adapter import MapModule
from mapconv.convert import ConvertOptions
from mapconv.formats.mapdir import FORMAT_VERSION
from mapconv.formats.peft import CONFIG_FILE, weights_name
from mapconv.hub import is_folder
from mapconv.placing import PlacedAdapter


def base_name(placed: PlacedAdapter) -> str:
    """What the result records as its base: the Hub id if the base came from the Hub's cache, else the folder."""
    recorded, folder = placed.adapter.base, placed.target.folder
    if recorded and not is_folder(recorded) and folder.parent.name == "snapshots":
        return recorded
    return str(folder.resolve())


def map_config(placed: PlacedAdapter, options: ConvertOptions, modules: Sequence[MapModule]) -> dict[str, Any]:
    """The content of ``map_config.json`` (DESIGN.md)."""
    entries = [
        scalars.to_dict()
        | {"base_tensor": item.weight.name, "base_dtype": item.weight.dtype, "base_shape": list(item.weight.shape)}
        for item, scalars in zip(placed.modules, modules, strict=True)
    ]
    return {
        "format_version": FORMAT_VERSION,
        "mapconv_version": mapconv.__version__,
        "base": {
            "name": base_name(placed),
            "revision": placed.adapter.revision,
            "fingerprint": _base_fingerprint(entries),
        },
        "source": {
            "name": str(placed.adapter.path.resolve()),
            "method": placed.adapter.method,
            "fingerprint": source_fingerprint(placed.adapter.path),
        },
        "options": asdict(options),
        "modules": entries,
    }


def source_fingerprint(folder: Path) -> str:
    """SHA-256 of an adapter's configuration and weights."""
    digest = hashlib.sha256()
    for name in (CONFIG_FILE, weights_name(folder)):
        with open(folder / name, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return f"sha256:{digest.hexdigest()}"


def _base_fingerprint(entries: Sequence[dict[str, Any]]) -> str:
    """Names, shapes, dtypes and norms of the adapted base tensors: free, because MAP needs the norms anyway."""
    lines = (f"{e['path']} {e['base_dtype']} {e['base_shape']} {e['base_norm']:.9e}\n" for e in entries)
    return f"sha256:{hashlib.sha256(''.join(lines).encode()).hexdigest()}"
