"""What a result records of where it came from: its base, its source, its options."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mapconv.adapter import Adapter, MapModule
from mapconv.algebra.fingerprint import Fingerprint
from mapconv.checkpoint.filenames import ADAPTER_FILES
from mapconv.errors import AdapterError
from mapconv.files import open_regular
from mapconv.formats.base import CONFIG_FILE, WEIGHTS_FILE
from mapconv.formats.mapdir import FORMAT_VERSION
from mapconv.formats.mlx import MLX_WEIGHTS
from mapconv.formats.pickle import PICKLE_FILE
from mapconv.hub.reference import origin_of
from mapconv.metadata.card import card_facts
from mapconv.placement.adapters import PlacedAdapter
from mapconv.version import __version__


def base_name(placed: PlacedAdapter) -> str:
    """What the result records as its base: the Hub id if the base came from the Hub's cache, else the folder."""
    return recorded_name(placed.target.folder)[0]


def base_revision(placed: PlacedAdapter) -> str | None:
    """The commit of a base from the Hub; for a folder, what the source's configuration says of it."""
    return recorded_name(placed.target.folder)[1] or placed.adapter.revision


def map_config(
    placed: PlacedAdapter,
    options: Mapping[str, Any],
    modules: Sequence[MapModule],
    *,
    data: Mapping[str, Any] | None = None,
    sources: Sequence[Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """The content of ``map_config.json``.

    ``data`` describes the text that refits weighed errors by, ``sources`` what the result was made from (None: the
    adapter itself).
    """
    entries = [
        scalars.to_dict()
        | {"base_tensor": item.weight.name, "base_dtype": item.weight.dtype, "base_shape": list(item.weight.shape)}
        for item, scalars in zip(placed.modules, modules, strict=True)
    ]
    source, *others = [source_record(placed.adapter)] if sources is None else sources
    record = map_record(entries, base=_base_record(placed), source=source, options=options, data=data)
    return record | {"more_sources": others} if others else record


def map_record(
    entries: Sequence[dict[str, Any]],
    *,
    base: Mapping[str, Any],
    source: Mapping[str, Any] | None,
    options: Mapping[str, Any],
    data: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """``map_config.json`` from its parts; an adapter that was trained from scratch has no source."""
    return {
        "format_version": FORMAT_VERSION,
        "mapconv_version": __version__,
        "base": {**base, "fingerprint": _base_fingerprint(entries)},
        "source": source,
        "options": options,
        "data": data,
        "modules": entries,
    }


def merge_record(placed: Sequence[PlacedAdapter], weights: Sequence[float] | None) -> dict[str, Any]:
    """The content of ``map_merge.json``: what a merged model was made from, for its model card.

    ``modules`` holds the scalars where one MAP adapter was merged.
    """
    first, *others = placed
    return {
        "format_version": FORMAT_VERSION,
        "mapconv_version": __version__,
        "base": _base_record(first),
        "source": source_record(first.adapter),
        "more_sources": [source_record(other.adapter) for other in others],
        "weights": None if weights is None else list(weights),
        "modules": [] if others else [scalars.to_dict() for scalars in first.adapter.map_modules],
    }


def source_fingerprint(source: Path) -> str:
    """SHA-256 of an adapter's configuration and weights, or of the one file that it is."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 18))  # stays in a core's cache
    for path in [source] if source.is_file() else _files_in(source):
        with open_regular(path, AdapterError) as file:
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
    return f"sha256:{digest.hexdigest()}"


def source_record(adapter: Adapter) -> dict[str, Any]:
    """The adapter that a result was made from; of a MAP adapter also what that was made from."""
    source = adapter.path
    # What lies beside a file on this machine need not be about it; on the Hub it is.
    folder = source.parent if source.is_file() and origin_of(source) is not None else source
    name, revision = recorded_name(source)
    record = {
        "name": name,
        "revision": revision,
        "method": adapter.method,
        "fingerprint": source_fingerprint(source),
        "card": card_facts(folder),
    }
    earlier = (adapter.map_config or {}).get("source")
    return record | {"source": earlier} if isinstance(earlier, dict) else record


def finetune_record(folder: Path, weights: Iterable[tuple[tuple[str, int | None], Fingerprint]]) -> dict[str, Any]:
    """The full finetune that a result was extracted from, known by the norms and projections of its ``weights``, each
    with its module's path and its number in a stack of experts."""
    name, revision = recorded_name(folder)
    named = ((path if expert is None else f"{path}.{expert}", found) for (path, expert), found in weights)
    lines = (f"{path} {found.norm:.9e} {found.projection:.9e}\n" for path, found in named)
    fingerprint = f"sha256:{hashlib.sha256(''.join(lines).encode()).hexdigest()}"
    return {
        "name": name,
        "revision": revision,
        "method": "full finetune",
        "fingerprint": fingerprint,
        "card": card_facts(folder),
    }


def _files_in(folder: Path) -> list[Path]:
    """PEFT's configuration and weights, or MLX-LM's; of another trainer's folder whatever it is read from."""
    weights = next((name for name in (WEIGHTS_FILE, PICKLE_FILE, MLX_WEIGHTS) if (folder / name).exists()), None)
    if weights is not None:
        return [folder / CONFIG_FILE, folder / weights]
    found = {path for pattern in (*ADAPTER_FILES, "*.pt", "*.safetensors") for path in folder.glob(pattern)}
    return sorted(found)


def _base_record(placed: PlacedAdapter) -> dict[str, Any]:
    return {"name": base_name(placed), "revision": base_revision(placed), "card": card_facts(placed.target.folder)}


def recorded_name(folder: Path) -> tuple[str, str | None]:
    """(name, commit) of a folder from the Hub's cache, (absolute path, None) of any other."""
    origin = origin_of(folder)
    if origin is None:
        return str(folder.resolve()), None
    return str(replace(origin, revision=None)), origin.revision


def _base_fingerprint(entries: Sequence[dict[str, Any]]) -> str:
    """Names, shapes, dtypes, norms and projections of the adapted base tensors: MAP needs the norms anyway."""
    lines = (
        f"{e['path']} {e['base_dtype']} {e['base_shape']} {e['base_norm']:.9e} {_relative_projection(e):.9f}\n"
        for e in entries
    )
    return f"sha256:{hashlib.sha256(''.join(lines).encode()).hexdigest()}"


def _relative_projection(entry: Mapping[str, Any]) -> float:
    """In parts of the norm, to which its rounding is relative."""
    return (entry.get("base_projection") or 0.0) / (entry["base_norm"] or 1.0)
