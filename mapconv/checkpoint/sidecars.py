"""The files beside the weights: what ``from_pretrained`` needs, by an allow-list, and nothing else.

Whatever the list does not name stays behind: optimizer and scheduler states, training arguments, ``.env``, logs.
"""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mapconv.checkpoint.staging import write_file

MODEL_CONFIG = "config.json"
#: Written into a merged model: what it was made from. transformers leaves a file of this name alone.
MERGE_RECORD = "map_merge.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model*", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece*.model", "*.tiktoken", "tekken.json",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja",
)  # fmt: skip
MODEL_FILES = (
    "generation_config.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "image_processor_config.json", "configuration_*.py", "modeling_*.py", "tokenization_*.py", "processing_*.py",
    "LICENSE*", "NOTICE*",
)  # fmt: skip


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
    _copy(base, target, _matching(base, MODEL_FILES))
    if brings_tokenizer(adapter):
        copy_tokenizer(adapter, target)
        return [f"tokenizer taken from the adapter ({adapter})"]
    _copy(base, target, tokenizer_files(base))
    return []


def write_model_config(base: Path, target: Path, dtype: str, changed: dict[str, Any] | None = None) -> list[str]:
    """Write the model's ``config.json``: the base's or the ``changed`` one, with the dtype that the weights now have.

    Returns notes for the user.
    """
    path = base / MODEL_CONFIG
    if changed is None and not path.exists():
        return [f"{base} has no {MODEL_CONFIG}, so the merged folder has none either"]
    config = json.loads(path.read_bytes()) if changed is None else dict(changed)
    if dtype != "auto" and "_class_name" not in config:  # diffusers' configurations name no dtype
        config.setdefault("dtype", dtype)
        _set_dtype(config, dtype)
    write_file(target / MODEL_CONFIG, json.dumps(config, indent=2) + "\n")
    return []


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and isinstance(value, str):
            config[key] = dtype
        elif isinstance(value, dict):
            _set_dtype(value, dtype)


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    candidates = [*folder.glob("*"), *folder.glob("*/*.jinja")]
    names = sorted(path.relative_to(folder) for path in candidates if path.is_file())
    return [name for name in names if any(fnmatch(name.as_posix(), pattern) for pattern in patterns)]


def _copy(source: Path, target: Path, names: list[Path]) -> list[Path]:
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)
    return names
