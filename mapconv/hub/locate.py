"""Find what a command names: a local folder as it is, or a Hub reference through the client's ordinary cache.

A reference is pinned when it is fetched: the cache keeps a snapshot under its commit, and what is made from it records
that commit (``origin_of``). Only the files that are needed are fetched.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from mapconv.checkpoint.filenames import (
    MODEL_CONFIG,
    MODEL_FILES,
    PIPELINE_FILE,
    STEMS,
    TOKENIZER_FILES,
    weights_files,
)
from mapconv.checkpoint.index import Checkpoint, read_checkpoint
from mapconv.checkpoint.quantization import MODELOPT_FILE
from mapconv.errors import AdapterError, CheckpointError, HubError, UnsupportedError
from mapconv.files import LARGE, open_regular
from mapconv.hub.faults import ask_hub
from mapconv.hub.originals import CARD_FILE, ORIGINAL, original_of
from mapconv.hub.ranges import RangesUnsupportedError, ranged_checkpoint
from mapconv.hub.reference import HubReference, parse_reference
from mapconv.jsonfile import read_object

_ADAPTER_CONFIG, _ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_ADAPTER_PICKLE = "adapter_model.bin"
_ADAPTER_FILES = (_ADAPTER_CONFIG, _ADAPTER_WEIGHTS, "map_config.json", CARD_FILE, *TOKENIZER_FILES)
_OR_BASE = "or give the base model's folder with --base"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SINGLES, _INDEXES = zip(*map(weights_files, STEMS), strict=True)
_SMALL_MODEL_FILES = (MODEL_CONFIG, MODELOPT_FILE, PIPELINE_FILE, *_INDEXES, CARD_FILE, *MODEL_FILES, *TOKENIZER_FILES)


def locate_adapter(source: str | Path, *, allow_pickle: bool = False) -> Path:
    """The folder of an adapter: a local one as it is, or fetched if ``source`` is a Hub reference with an owner.

    Raises:
        HubError: the Hub does not give it. AdapterError: the repository holds no adapter there.
    """
    reference = hub_reference(source)
    if reference is None:
        return _folder_of(Path(source))
    if reference.subfolder and reference.subfolder.endswith(".safetensors"):
        folder, _, file = reference.subfolder.rpartition("/")
        reference = replace(reference, subfolder=folder or None)
        if file != _ADAPTER_WEIGHTS:
            return _snapshot(reference, (file,)) / file
    pickles = [_ADAPTER_PICKLE] if allow_pickle else []
    folder = _snapshot(reference, (*_ADAPTER_FILES, *pickles))
    weights = [_ADAPTER_WEIGHTS, *pickles]
    if not (folder / _ADAPTER_CONFIG).exists() or not any((folder / name).exists() for name in weights):
        _refuse_without_adapter(reference, folder)
    return folder


def _folder_of(path: Path) -> Path:
    """The adapter's folder, where one of its files was named; any other path as it is."""
    named = path.name in (_ADAPTER_CONFIG, _ADAPTER_WEIGHTS, _ADAPTER_PICKLE)
    return path.parent if named and path.is_file() and (path.parent / _ADAPTER_CONFIG).is_file() else path


def locate_result(result: str | Path) -> Path:
    """The folder of an adapter or of a merged model, local or from the Hub."""
    reference = hub_reference(result)
    if reference is None:
        return Path(result)
    folder = _snapshot(reference, (_ADAPTER_CONFIG, MODEL_CONFIG))
    return locate_adapter(result) if (folder / _ADAPTER_CONFIG).exists() else _whole_model(reference)


def locate_base(base: str | Path | None, recorded: str | None, revision: str | None, adapter: Path) -> Path:
    """The folder of the base model: ``base`` if given, else what the adapter's configuration recorded.

    ``original`` as ``base`` is the model that the recorded one is a quantized copy of, by that one's card.

    Raises:
        CheckpointError: neither names a model that can be had. HubError: the Hub does not give it.
    """
    found = _base(base, recorded, revision, adapter)
    return found if isinstance(found, Path) else _whole_model(found, _OR_BASE)


def open_base(
    base: str | Path | None, recorded: str | None, revision: str | None, adapter: Path, *, lean: bool = False
) -> Checkpoint:
    """The base model's headers; with ``lean`` a base on the Hub stays there, but for the bytes that are asked for.

    Raises:
        CheckpointError: neither names a model that can be had. HubError: the Hub does not give it.
    """
    found = _base(base, recorded, revision, adapter)
    return read_checkpoint(found) if isinstance(found, Path) else _opened(found, _OR_BASE, lean=lean)


def open_model(model: str | Path, *, lean: bool = False) -> Checkpoint:
    """A model's headers, as of ``open_base``, where it is no adapter's base but named itself.

    Raises:
        CheckpointError: neither a model's folder nor a Hub reference. HubError: the Hub does not give it.
    """
    reference = hub_reference(model)
    if reference is not None:
        return _opened(reference, "", lean=lean)
    if (Path(model) / _ADAPTER_CONFIG).is_file():
        raise CheckpointError(f"{model} is an adapter, not a model with all its weights: use `mapconv upgrade` on it.")
    if not is_folder(str(model)):
        raise CheckpointError(f"{model} is neither a folder nor a Hub id (owner/name).")
    return read_checkpoint(Path(model))


def _opened(reference: HubReference, hint: str, *, lean: bool) -> Checkpoint:
    if lean:
        folder = _snapshot(reference, _SMALL_MODEL_FILES, hint)
        if not _has_weights(folder):
            try:
                return ranged_checkpoint(reference, folder)
            except RangesUnsupportedError:
                pass  # a mirror that knows no byte ranges: fetch the whole files, as a merge does
    return read_checkpoint(_whole_model(reference, hint))


def _base(base: str | Path | None, recorded: str | None, revision: str | None, adapter: Path) -> Path | HubReference:
    if base is not None and str(base) == ORIGINAL and not is_folder(ORIGINAL):
        base = original_of_base(None, recorded, revision, adapter)
    name = str(base) if base is not None else recorded
    if not name:
        raise CheckpointError(f"{adapter} does not say which model it adapts: give the base model with --base.")
    if is_folder(name) or (name.endswith(".safetensors") and _exists(name)):
        return Path(name)
    if name.endswith(".gguf"):
        raise CheckpointError(
            f"{name} is a GGUF file, and mapconv reads safetensors: give the model that it was made from with --base."
        )
    reference = parse_reference(name)
    if reference is not None and base is None:
        # The configuration has the revision in a field of its own.
        reference = replace(reference, revision=reference.revision or revision)
    if base is not None and "/" not in str(base) and not str(base).startswith("."):
        # Only what a configuration recorded may be one word: an old model of the Hub, such as gpt2.
        raise CheckpointError(
            f"there is no folder {base} here: give --base as the base model's folder, or as a Hub id with its owner "
            "(owner/name)."
        )
    if reference is not None:
        return reference
    if base is None:
        raise CheckpointError(
            f"{adapter} was trained on {name}, which is not on this machine: give the base model with --base."
        )
    raise CheckpointError(f"{name} is neither a folder nor a Hub id (owner/name): give the base model with --base.")


def original_of_base(base: str | Path | None, recorded: str | None, revision: str | None, adapter: Path) -> str:
    """The model that a quantized base was made from, by that base's card; arguments as of ``locate_base``.

    Raises:
        CheckpointError: the card does not say. HubError: the Hub does not give it.
    """
    found = _base(base, recorded, revision, adapter)
    folder = found if isinstance(found, Path) else _snapshot(found, (CARD_FILE, MODEL_CONFIG), _OR_BASE)
    return original_of(folder, str(found))


def hub_reference(source: str | Path) -> HubReference | None:
    """The reference that ``source`` is, unless something local has that name; one bare word is a folder's name."""
    text = str(source)
    if _exists(text):
        return None
    reference = parse_reference(text)
    return reference if reference is not None and "/" in reference.repo_id else None


def is_folder(name: str) -> bool:
    """Whether ``name`` is a folder on this machine; a text that can be no path at all is none."""
    try:
        return Path(name).is_dir()
    except (OSError, ValueError):  # too long for a path, or with a zero byte in it
        return False


def _exists(name: str) -> bool:
    try:
        return Path(name).exists()
    except (OSError, ValueError):
        return False


def _whole_model(reference: HubReference, hint: str = "") -> Path:
    """All of a model that ``from_pretrained`` needs: one weights file, or the shards that the index lists."""
    folder = _snapshot(reference, (*_SMALL_MODEL_FILES, *_SINGLES[:-1]), hint)
    if not _has_weights(folder):
        # Only these: a repository may hold the same weights in another layout as well (consolidated.safetensors).
        return _snapshot(reference, (*_SMALL_MODEL_FILES, *(_shards(folder) or _SINGLES[-1:])), hint)
    return folder


def _has_weights(folder: Path) -> bool:
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


def _snapshot(reference: HubReference, patterns: Iterable[str], hint: str = "") -> Path:
    """Fetch the files that match, into the client's cache; the folder's name is the commit.

    ``hint`` ends the sentence of an error: what else the user may do.
    """
    from huggingface_hub import constants, snapshot_download

    from mapconv.hub.client import limit_waits, quiet_client

    prefix = f"{reference.subfolder}/" if reference.subfolder else ""
    wanted = [prefix + pattern for pattern in patterns]
    blobs = Path(constants.HF_HUB_CACHE, "models--" + reference.repo_id.replace("/", "--"), "blobs")
    before = _names_in(blobs)

    def fetch() -> str:
        limit_waits()
        return snapshot_download(reference.repo_id, revision=reference.revision, allow_patterns=wanted)

    with quiet_client():
        folder = ask_hub(
            fetch,
            str(reference),
            "read",
            hint=lambda error: hint,
        )
    _check_hashes(blobs, _names_in(blobs) - before, reference)
    return Path(folder, reference.subfolder or "")


def _names_in(folder: Path) -> set[str]:
    return set(os.listdir(folder)) if folder.is_dir() else set()


def _check_hashes(blobs: Path, names: set[str], reference: HubReference) -> None:
    """Hold the large files that were fetched to their SHA-256, which is the name that the Hub gives them in the cache.

    The client itself compares no more than their length.

    Raises:
        HubError: the content is another one; it is removed, so that the next run fetches it again.
    """
    for name in sorted(filter(_SHA256.fullmatch, names)):
        digest = hashlib.sha256()
        with open_regular(blobs / name, HubError) as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        if digest.hexdigest() != name:
            (blobs / name).unlink()
            raise HubError(
                f"{reference}: a file arrived damaged (its SHA-256 is {digest.hexdigest()[:12]}…, the Hub says "
                f"{name[:12]}…) and was removed from the cache: run the same command again."
            )


def _refuse_without_adapter(reference: HubReference, folder: Path) -> None:
    """Say what the repository holds instead of an adapter at that place."""
    from huggingface_hub import HfApi

    files = ask_hub(
        lambda: HfApi().list_repo_files(reference.repo_id, revision=reference.revision), str(reference), "read"
    )
    prefix = f"{reference.subfolder}/" if reference.subfolder else ""
    if (folder / _ADAPTER_CONFIG).exists():
        if f"{prefix}{_ADAPTER_PICKLE}" in files:
            raise UnsupportedError(
                f"{reference} has its weights as a pickle only ({_ADAPTER_PICKLE}), which can run code when it is "
                "opened: pass --allow-pickle to read it with torch's weights-only loader."
            )
        raise AdapterError(f"{reference} has {_ADAPTER_CONFIG} but no {_ADAPTER_WEIGHTS} on the Hub.")
    places = [name.rpartition("/")[0] for name in files if name.endswith(f"/{_ADAPTER_CONFIG}")]
    if places:
        shown = ", ".join(f"{reference.repo_id}:{place}" for place in places[:5])
        raise AdapterError(f"{reference} has no {_ADAPTER_CONFIG}, but its folders do: name one of them, as {shown}.")
    raise AdapterError(f"{reference} has no {_ADAPTER_CONFIG} on the Hub: it is not an adapter's repository.")
