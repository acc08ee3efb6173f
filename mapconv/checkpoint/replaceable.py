"""Which folders ``--force`` may replace: models and adapters, and nothing that somebody else put there."""

from __future__ import annotations

import os
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from mapconv.checkpoint import filenames as names
from mapconv.errors import MapconvError, OutputError
from mapconv.jsonfile import read_object

_NAMED = 5
_WEIGHTS = (*names.WEIGHT_FILES, *names.INDEX_FILES)
_KNOWN = (
    names.MODEL_CONFIG, *names.RECORD_FILES, *names.COMPANION_FILES, *names.TOKENIZER_FILES, *names.MODEL_FILES,
    *_WEIGHTS, names.PIPELINE_FILE, "scheduler_config.json", names.AWAITING,
)  # fmt: skip


def check_replaceable(folder: Path) -> None:
    """Refuse to replace a folder that holds anything but what mapconv, PEFT or transformers writes.

    Raises:
        OutputError: with the entries that none of them writes, or because no file says what the folder is.
    """
    entries = list(_entries(folder))
    if not entries:
        return
    shards, parts = _listed_shards(folder), _pipeline_parts(folder)
    entries = [entry for entry in entries if entry.rstrip("/") not in parts]
    strange = _strange(entries, shards)
    for part in sorted(parts):
        strange += [f"{part}/{entry}" for entry in _strange(_entries(folder / part), _listed_shards(folder / part))]
    if strange:
        more = f" and {len(strange) - _NAMED} more" if len(strange) > _NAMED else ""
        raise OutputError(
            f"{folder} holds {', '.join(strange[:_NAMED])}{more}, part of neither a model nor an adapter, so --force "
            "will not replace the folder: move that elsewhere, or choose another output folder."
        )
    # A README, a licence and a config.json are in the folders of many a project.
    if not any(entry in shards or _matches(entry, (*names.RECORD_FILES, *_WEIGHTS)) for entry in entries):
        raise OutputError(
            f"{folder} holds neither a model nor an adapter, so --force will not replace it: choose another output "
            "folder."
        )


def _strange(entries: Iterable[str], shards: set[str]) -> list[str]:
    return sorted(entry for entry in entries if entry not in shards and not _matches(entry, _KNOWN))


def _pipeline_parts(folder: Path) -> set[str]:
    """The folders that a pipeline's own list names."""
    try:
        listed = read_object(folder / names.PIPELINE_FILE, OutputError)
    except (OSError, MapconvError):
        return set()
    plain = {name for name in listed if name == os.path.basename(name)}
    return {name for name in plain if (folder / name).is_dir() and not (folder / name).is_symlink()}


def _entries(folder: Path) -> Iterable[str]:
    """Files and links, by their path below ``folder``; a folder that is known to hold files gives those."""
    below = {pattern.partition("/")[0] for pattern in _KNOWN if "/" in pattern}
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                yield entry.name
            elif entry.name not in below:
                yield f"{entry.name}/"
            else:
                yield from (
                    f"{entry.name}/{inner.name}{'/' if inner.is_dir() else ''}" for inner in os.scandir(entry.path)
                )


def _matches(entry: str, patterns: Iterable[str]) -> bool:
    return any(entry.count("/") == pattern.count("/") and fnmatchcase(entry, pattern) for pattern in patterns)


def _listed_shards(folder: Path) -> set[str]:
    """The weights' files by the folder's own index: a merge keeps the names of its base's shards."""
    shards: set[str] = set()
    for index in names.INDEX_FILES:
        try:
            table = read_object(folder / index, OutputError).get("weight_map")
        except (OSError, MapconvError):
            continue
        if isinstance(table, dict):
            shards |= {str(name) for name in table.values() if str(name).endswith(".safetensors")}
    return shards
