"""Find what a command names: a local folder as it is, or a Hub reference through the client's ordinary cache.

A reference is pinned when it is fetched: the cache keeps a snapshot under its commit, and what is made from it records
that commit (``origin_of``). Only the files that are needed are fetched.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from mapconv.checkpoint.filenames import (
    MODEL_CONFIG,
    TOKENIZER_FILES,
)
from mapconv.checkpoint.gguf.header import is_gguf
from mapconv.checkpoint.index import Checkpoint, read_checkpoint
from mapconv.errors import AdapterError, CheckpointError, UnsupportedError
from mapconv.hub.arriving import arriving_checkpoint
from mapconv.hub.model_files import (
    SMALL_MODEL_FILES,
    has_weights,
    in_parts,
    pipeline_parts,
    repository_files,
    split_weights,
    whole_model,
)
from mapconv.hub.originals import CARD_FILE, ORIGINAL, original_of
from mapconv.hub.ranges import RangesUnsupportedError, ranged_checkpoint
from mapconv.hub.reference import HubReference, parse_reference
from mapconv.hub.snapshots import snapshot

_ADAPTER_CONFIG, _ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_ADAPTER_PICKLE = "adapter_model.bin"
_ADAPTER_FILES = (_ADAPTER_CONFIG, _ADAPTER_WEIGHTS, "map_config.json", CARD_FILE, *TOKENIZER_FILES)
#: How much of a model on the Hub comes here: all of it before anything is read, for what runs the model; its headers,
#: and ``files`` that come whole while others are read; or its headers and the byte ``ranges`` that are read.
Fetch = Literal["whole", "files", "ranges"]
_SINGLE_FILES = (".safetensors", ".gguf")
_OR_BASE = "or give the base model's folder with --base"


def locate_adapter(source: str | Path, *, allow_pickle: bool = False) -> Path:
    """The folder of an adapter: a local one as it is, or fetched if ``source`` is a Hub reference with an owner.

    Raises:
        HubError: the Hub does not give it. AdapterError: the repository holds no adapter there.
    """
    reference = hub_reference(source)
    if reference is None:
        return _folder_of(Path(source))
    reference, file = reference.split_file(".safetensors")
    if file not in (None, _ADAPTER_WEIGHTS):
        return snapshot(reference, (file,)) / file
    pickles = [_ADAPTER_PICKLE] if allow_pickle else []
    folder = snapshot(reference, (*_ADAPTER_FILES, *pickles))
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
    folder = snapshot(reference, (_ADAPTER_CONFIG, MODEL_CONFIG))
    return locate_adapter(result) if (folder / _ADAPTER_CONFIG).exists() else whole_model(reference)


def locate_base(base: str | Path | None, recorded: str | None, revision: str | None, adapter: Path) -> Path:
    """The folder of the base model: ``base`` if given, else what the adapter's configuration recorded.

    ``original`` as ``base`` is the model that the recorded one is a quantized copy of, by that one's card.

    Raises:
        CheckpointError: neither names a model that can be had. HubError: the Hub does not give it.
    """
    found = find_base(base, recorded, revision, adapter)
    return found if isinstance(found, Path) else whole_model(found, _OR_BASE)


def open_base(
    base: str | Path | HubReference | None,
    recorded: str | None,
    revision: str | None,
    adapter: Path,
    *,
    fetch: Fetch = "whole",
    root: Path | None = None,
) -> Checkpoint:
    """The base model's headers; ``fetch`` says how much of a base on the Hub comes here besides.

    ``root`` is the folder for byte ranges (``hub.ranges.ranged_checkpoint``).

    Raises:
        CheckpointError: neither names a model that can be had. HubError: the Hub does not give it.
    """
    found = find_base(base, recorded, revision, adapter)
    return read_checkpoint(found) if isinstance(found, Path) else _opened(found, _OR_BASE, fetch, root)


def open_model(model: str | Path, *, fetch: Fetch = "whole") -> Checkpoint:
    """A model's headers, as of ``open_base``, where it is no adapter's base but named itself.

    Raises:
        CheckpointError: neither a model's folder nor a Hub reference. HubError: the Hub does not give it.
    """
    reference = hub_reference(model)
    if reference is not None:
        return _opened(reference, "", fetch)
    if (Path(model) / _ADAPTER_CONFIG).is_file():
        raise CheckpointError(f"{model} is an adapter, not a model with all its weights: use `mapconv upgrade` on it.")
    if not is_folder(str(model)) and not (is_gguf(Path(model)) and _exists(str(model))):
        raise CheckpointError(f"{model} is neither a folder nor a Hub id (owner/name).")
    return read_checkpoint(Path(model))


def _opened(reference: HubReference, hint: str, fetch: Fetch, root: Path | None = None) -> Checkpoint:
    place, file = split_weights(reference)
    # What makes a checkpoint of a GGUF file reads more of it than its header.
    if fetch == "ranges" or (fetch == "files" and not str(file).endswith(".gguf")):
        folder = snapshot(place, SMALL_MODEL_FILES, hint)
        parts = pipeline_parts(folder)
        if parts:
            folder = snapshot(place, in_parts(SMALL_MODEL_FILES, parts), hint)
        if not (has_weights(folder) if file is None else (folder / file).exists()):
            try:
                found = ranged_checkpoint(place, folder, file, parts=parts or ("",), root=root)
                return found if fetch == "ranges" else arriving_checkpoint(found, folder, hint)
            except RangesUnsupportedError:
                pass  # a mirror that knows no byte ranges: fetch the whole files, as a command that runs the model does
    return read_checkpoint(whole_model(reference, hint))


def find_base(
    base: str | Path | HubReference | None, recorded: str | None, revision: str | None, adapter: Path
) -> Path | HubReference:
    """Where the base model is, on this machine or on the Hub; arguments as of ``locate_base``.

    Raises:
        CheckpointError: neither names a model that can be had.
    """
    if isinstance(base, HubReference):
        return base
    if base is not None and str(base) == ORIGINAL and not is_folder(ORIGINAL):
        base = original_of_base(None, recorded, revision, adapter)
    name = str(base) if base is not None else recorded
    if not name:
        raise CheckpointError(f"{adapter} does not say which model it adapts: give the base model with --base.")
    if is_folder(name) or (name.endswith(_SINGLE_FILES) and _exists(name)):
        return Path(name)
    reference = parse_reference(name)
    if reference is not None and base is None:
        # The configuration has the revision in a field of its own.
        reference = replace(reference, revision=reference.revision or revision)
    if base is not None and "/" not in str(base) and not str(base).startswith("."):
        # Only what a configuration recorded may be one word: an old model of the Hub, such as gpt2.
        raise CheckpointError(
            f"there is no {'file' if str(base).endswith(_SINGLE_FILES) else 'folder'} {base} here: give --base as the "
            "base model's folder or file, or as a Hub id with its owner (owner/name)."
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
    found = find_base(base, recorded, revision, adapter)
    if isinstance(found, Path):
        return original_of(found, str(found))
    place, file = found.split_file(".gguf")
    folder = snapshot(place, (CARD_FILE, MODEL_CONFIG), _OR_BASE)
    return original_of(folder if file is None else folder / file, str(found))


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


def _refuse_without_adapter(reference: HubReference, folder: Path) -> None:
    """Say what the repository holds instead of an adapter at that place."""
    files = repository_files(reference)
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
