"""Which files of a model's repository are fetched: one file of weights or the shards, and what lies beside them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from mapconv.checkpoint.filenames import (
    MODEL_CONFIG,
    MODEL_FILES,
    PIPELINE_FILE,
    STEMS,
    TOKENIZER_FILES,
    weights_files,
)
from mapconv.checkpoint.gguf.model import part_names
from mapconv.checkpoint.quantization import MODELOPT_FILE
from mapconv.errors import CheckpointError
from mapconv.files import LARGE
from mapconv.hub.faults import ask_hub
from mapconv.hub.originals import CARD_FILE
from mapconv.hub.reference import HubReference
from mapconv.hub.snapshots import snapshot
from mapconv.jsonfile import read_object

_SINGLES, _INDEXES = zip(*map(weights_files, STEMS), strict=True)
#: Weights in half precision are fetched where there are no others.
_PLAIN, _HALF = (tuple(name for name in _SINGLES if (".fp16." in name) == half) for half in (False, True))
SMALL_MODEL_FILES = (MODEL_CONFIG, MODELOPT_FILE, PIPELINE_FILE, *_INDEXES, CARD_FILE, *MODEL_FILES, *TOKENIZER_FILES)


def whole_model(reference: HubReference, hint: str = "") -> Path:
    """All of a model that ``from_pretrained`` needs: one weights file, or the shards that the index lists.

    The reference of a GGUF file gives the path of that, with its further parts beside it; that of a safetensors file
    the path of that alone. A pipeline comes with all of its folders.
    """
    place, file = split_weights(reference)
    if file is not None and file.endswith(".safetensors"):
        folder = snapshot(place, (file,), hint)
        if not (folder / file).exists():
            raise CheckpointError(f"{place} has no file {file}: name one that it has, with --base.")
        return folder / file
    if file is not None:
        folder = snapshot(place, (*SMALL_MODEL_FILES, *part_names(file)), hint)
        if not (folder / file).exists():
            _refuse_without_gguf(reference)
        return folder / file
    folder = snapshot(reference, (*SMALL_MODEL_FILES, *_PLAIN), hint)
    parts = pipeline_parts(folder)
    if parts:
        folder = snapshot(reference, in_parts((*SMALL_MODEL_FILES, *_PLAIN), parts), hint)
        lacking = [part for part in parts if not has_weights(folder / part)]
        more = {f"{part}/{name}" for part in lacking for name in (_shards(folder / part) or _HALF)}
        return snapshot(reference, (*in_parts(SMALL_MODEL_FILES, parts), *sorted(more)), hint)
    if not has_weights(folder):
        # Only these: a repository may hold the same weights in another layout as well (consolidated.safetensors).
        folder = snapshot(reference, (*SMALL_MODEL_FILES, *(_shards(folder) or _HALF)), hint)
    if not has_weights(folder):
        _refuse_without_gguf(reference)
    return folder


def split_weights(reference: HubReference) -> tuple[HubReference, str | None]:
    """The folder of a reference, and the name of the weights file where it names one."""
    place, file = reference.split_file(".gguf")
    return reference.split_file(".safetensors") if file is None else (place, file)


def pipeline_parts(folder: Path) -> tuple[str, ...]:
    """The folders that a pipeline's list names; none of what is no pipeline, or has weights of its own."""
    if has_weights(folder) or not (folder / PIPELINE_FILE).exists():
        return ()
    listed = read_object(folder / PIPELINE_FILE, CheckpointError)
    named = [name for name, kind in listed.items() if isinstance(kind, list) and kind and kind[0] is not None]
    return tuple(name for name in named if name == os.path.basename(name) and name not in ("", ".", ".."))


def in_parts(names: Sequence[str], parts: Sequence[str]) -> tuple[str, ...]:
    """The files of a pipeline: those at its top, and those in each of its folders."""
    return (*SMALL_MODEL_FILES, *(f"{part}/{name}" for part in parts for name in (*names, "scheduler_config.json")))


def has_weights(folder: Path) -> bool:
    """Whether all of a model's weights are here."""
    if any((folder / name).exists() for name in _SINGLES):
        return True
    shards = _shards(folder)
    return bool(shards) and all((folder / name).exists() for name in shards)


def _shards(folder: Path) -> list[str]:
    """The files that the index lists; read_checkpoint reports what is wrong with an index."""
    for index in _INDEXES:
        try:
            weight_map = read_object(folder / index, CheckpointError, limit=LARGE)["weight_map"]
            return sorted({str(name) for name in weight_map.values()})
        except (OSError, CheckpointError, KeyError, AttributeError):
            continue
    return []


def _refuse_without_gguf(reference: HubReference) -> None:
    """Name the GGUF files of a repository, where it has some and the reference is none of them."""
    names = [name for name in repository_files(reference) if name.endswith(".gguf")]
    if names or reference.split_file(".gguf")[1]:
        shown = f"name one of its files, such as {reference.repo_id}/{names[0]}" if names else "it has no GGUF files"
        raise CheckpointError(f"{reference} is not a model that mapconv can read there: {shown}, with --base.")


def repository_files(reference: HubReference) -> list[str]:
    """The names of all files of a repository."""
    from huggingface_hub import HfApi

    return ask_hub(
        lambda: HfApi().list_repo_files(reference.repo_id, revision=reference.revision), str(reference), "read"
    )
