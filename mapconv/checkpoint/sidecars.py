"""The files beside the weights: what ``from_pretrained`` needs, by an allow-list, and nothing else.

Whatever the list does not name stays behind: optimizer and scheduler states, training arguments, ``.env``, logs.
A file of the list that is a link out of its folder, a pipe or a device stops every command that reads the folder: a
stranger's folder must not make us read, copy or publish a private file under a harmless name.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mapconv.checkpoint.filenames import MERGE_RECORD, MODEL_CONFIG, MODEL_FILES, PIPELINE_FILE, TOKENIZER_FILES
from mapconv.checkpoint.gguf.header import is_gguf
from mapconv.checkpoint.gguf.model import small_files
from mapconv.checkpoint.model_config import read_model_config
from mapconv.checkpoint.quantization import MODELOPT_FILE, QUANTIZATION_KEYS, with_plain_modules, without_quantization
from mapconv.checkpoint.staging import write_file
from mapconv.errors import CheckpointError, MapconvError
from mapconv.files import check_regular, open_regular

#: All that mapconv or the libraries that it calls read from a folder, besides the weights.
_READ_FILES = (
    *TOKENIZER_FILES, *MODEL_FILES, "README.md", "*config.json", "*.index*.json", PIPELINE_FILE, MERGE_RECORD,
    "verify.json",
)  # fmt: skip
#: What a pipeline has beside its models.
_PIPELINE_FILES = (PIPELINE_FILE, "scheduler_config.json", MODEL_CONFIG, *TOKENIZER_FILES, *MODEL_FILES)


def check_folder(folder: Path, kind: type[MapconvError]) -> None:
    """Refuse a folder in which a file that will be read is a link that leaves it, or no regular file.

    Raises:
        kind: with the file's name.
    """
    for entry in _entries(folder):
        if _is_listed(entry, _READ_FILES) and not (folder / entry).is_dir():
            _is_there(folder, entry, kind)


def tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizer's files in ``folder``, relative to it."""
    return _matching(folder, TOKENIZER_FILES)


def brings_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer can be loaded from the folder, not just a setting or a template for another's."""
    return any(
        path.name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
        for path in tokenizer_files(folder)
    )


def model_files(folder: Path) -> list[Path]:
    """The model's other small files in ``folder``, relative to it: all but ``config.json`` and the weights."""
    return _matching(folder, MODEL_FILES)


def copy_tokenizer(source: Path, target: Path) -> list[Path]:
    """Copy the tokenizer's files, if there are any, and return their names."""
    return _copy(source, target, tokenizer_files(source))


def copy_model_files(base: Path, adapter: Path, target: Path) -> list[str]:
    """Copy all that ``from_pretrained`` needs but the weights and ``config.json``; return notes for the user.

    An adapter that brings a tokenizer was trained with it (a chat template, added tokens): it replaces the base's.
    """
    base = small_files(base)
    _copy(base, target, _matching(base, MODEL_FILES))
    if brings_tokenizer(adapter):
        copy_tokenizer(adapter, target)
        return [f"tokenizer taken from the adapter ({adapter})"]
    _copy(base, target, tokenizer_files(base))
    return []


def copy_pipeline_files(source: Path, target: Path) -> None:
    """Copy the small files of a pipeline's top, or of a part that has no weights (a scheduler, a tokenizer)."""
    target.mkdir(exist_ok=True)
    _copy(source, target, _matching(source, _PIPELINE_FILES))


def write_model_config(
    base: Path,
    target: Path,
    dtype: str,
    changed: dict[str, Any] | None = None,
    *,
    quantized: bool = False,
    lifted: Sequence[str] = (),
    plain: Sequence[str] = (),
) -> list[str]:
    """Write the model's ``config.json``: the base's or the ``changed`` one, with the dtype that the weights now have.

    The weights are plain, whatever the base's are, unless they stay ``quantized`` as those are; modules that leave
    the codes are ``lifted``, and ``plain`` ones were in none.

    Returns notes for the user.
    """
    base = small_files(base)
    made = is_gguf(base)  # of its metadata
    there = made or (base / MODEL_CONFIG).exists()
    if changed is None and not there:
        return [f"{base} has no {MODEL_CONFIG}, so the merged folder has none either"]
    own = read_model_config(base) if there else {}
    config = without_quantization(own if changed is None else changed)
    if quantized:
        kept = {key: own[key] for key in QUANTIZATION_KEYS if key in own}
        if lifted:
            kept = {key: with_plain_modules(value, lifted, plain) for key, value in kept.items()}
        config |= kept
        _copy(base, target, _matching(base, (MODELOPT_FILE,)))
    if dtype != "auto" and "_class_name" not in config:  # diffusers' configurations name no dtype
        config.setdefault("dtype", dtype)
        _set_dtype(config, dtype)
    write_file(target / MODEL_CONFIG, json.dumps(config, indent=2) + "\n")
    return [f"{MODEL_CONFIG} is made of the metadata in {base.name}"] if made else []


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and isinstance(value, str):
            config[key] = dtype
        elif isinstance(value, dict):
            _set_dtype(value, dtype)


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    names = (name for name in _entries(folder) if _is_listed(name, patterns) and not (folder / name).is_dir())
    return sorted(Path(name) for name in names if _is_there(folder, name, CheckpointError))


def _entries(folder: Path) -> Iterator[str]:
    """Names in a folder, and of the templates in the folders below it."""
    if not folder.is_dir():
        return
    yield from os.listdir(folder)
    yield from (path.relative_to(folder).as_posix() for path in folder.glob("additional_chat_templates/*"))


def _is_listed(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _is_there(folder: Path, name: str, kind: type[MapconvError]) -> bool:
    """Whether a listed file exists; a link that ends nowhere does not."""
    try:
        check_regular(folder / name, kind, folder=folder)
    except FileNotFoundError:
        return False
    return True


def _copy(source: Path, target: Path, names: list[Path]) -> list[Path]:
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        with open_regular(source / name, CheckpointError, folder=source) as file, open(target / name, "wb") as copy:
            shutil.copyfileobj(file, copy)
    return names
