"""PEFT directories: ``adapter_config.json`` beside ``adapter_model.safetensors``."""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from pathlib import Path

from mapconv.adapter import Adapter, Module, TensorRef
from mapconv.checkpoint.index import read_tensor_file
from mapconv.errors import AdapterError, UnsupportedError
from mapconv.formats.config import LoraSettings, parse_settings, read_config

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
#: PEFT wraps a model twice, and every key of a file starts with the two attribute names.
KEY_PREFIX = "base_model.model."

_FLOATS = ("F32", "F16", "BF16")
# PEFT strips the adapter's name when it saves; other writers leave it in (`.lora_A.default.weight`).
_FACTOR = re.compile(r"(?P<path>.+)\.(?P<part>lora_A|lora_B)(?:\.[^.]+)?\.weight")
_MAGNITUDE = re.compile(r"(?P<path>.+)\.(?P<part>lora_magnitude_vector)(?:\.[^.]+)?")
#: Tensors of features that are not supported yet, by what their keys contain.
_FEATURES = {
    ".lora_embedding_": "LoRA on an embedding",
    ".lora_B.bias": "a LoRA with a bias of its own",
    ".token_adapter.": "trained token rows",
    ".trainable_tokens_delta": "trained token rows",
    ".modules_to_save.": "a fully trained module",
    ".base_layer.bias": "a trained bias",
    ".base_layer.weight": "a saved copy of the adapted layer (PEFT's save_embedding_layers)",
}


class PeftDirectory:
    """The dialect that PEFT's ``save_pretrained`` writes."""

    def detect(self, path: Path) -> bool:
        return (path / CONFIG_FILE).is_file()

    def read(self, path: Path) -> Adapter:
        config = read_config(path / CONFIG_FILE)
        settings = parse_settings(config, path / CONFIG_FILE)
        return Adapter(
            path=path,
            method="DoRA" if settings.use_dora else "LoRA",
            config=config,
            modules=read_modules(path, settings),
            base=settings.base,
            revision=settings.revision,
        )


def read_modules(folder: Path, settings: LoraSettings) -> tuple[Module, ...]:
    """The modules of the weights file, ordered by path with numbers as numbers; every tensor belongs to one.

    Raises:
        AdapterError: no weights, or a stray, missing or misshapen tensor. UnsupportedError: a tensor of a feature
            that mapconv refuses.
    """
    weights = folder / WEIGHTS_FILE
    if not weights.exists():
        if (folder / "adapter_model.bin").exists():
            raise UnsupportedError(
                f"{folder}/adapter_model.bin is a pickle, which can run code when it is opened: convert it to "
                f"{WEIGHTS_FILE} first."
            )
        raise AdapterError(f"{folder} has {CONFIG_FILE} but no {WEIGHTS_FILE}: download the weights.")
    tensors = read_tensor_file(weights).tensors
    if not tensors:
        raise AdapterError(f"{weights} holds no tensors: it was saved empty, and there is nothing to convert.")
    parts: dict[str, dict[str, TensorRef]] = defaultdict(dict)
    for ref in tensors:
        path, part = _split_key(ref)
        if part in parts[path]:
            raise AdapterError(f"{weights}: {ref.name} and {parts[path][part].name} are the same tensor of one module.")
        if ref.dtype not in _FLOATS:
            raise AdapterError(f"{weights}: {ref.name} has dtype {ref.dtype}, expected one of {', '.join(_FLOATS)}.")
        parts[path][part] = ref
    return tuple(_module(path, parts[path], settings) for path in sorted(parts, key=natural_order))


def natural_order(path: str) -> tuple[tuple[int, str], ...]:
    """A sort key that puts ``layers.2`` before ``layers.10``."""
    # Of two numbers the longer one is the larger; a hostile one may have more digits than int() takes.
    return tuple((len(part) if part.isdecimal() else sys.maxsize, part) for part in path.split("."))


def _split_key(ref: TensorRef) -> tuple[str, str]:
    """(module path, part) of a tensor's key."""
    for mark, feature in _FEATURES.items():
        if mark in ref.name:
            raise UnsupportedError(f"{ref.file}: tensor {ref.name} belongs to {feature}, which is not supported yet.")
    match = _FACTOR.fullmatch(ref.name) or _MAGNITUDE.fullmatch(ref.name)
    if match is None:
        raise AdapterError(
            f"{ref.file}: tensor {ref.name} is no part of a LoRA or DoRA module "
            "(expected ….lora_A.weight, ….lora_B.weight or ….lora_magnitude_vector)."
        )
    return match["path"].removeprefix(KEY_PREFIX), match["part"]


def _module(path: str, parts: dict[str, TensorRef], settings: LoraSettings) -> Module:
    known = next(iter(parts.values()))
    wanted = ["lora_A", "lora_B"] + ["lora_magnitude_vector"] * settings.use_dora
    for part in wanted:
        if part not in parts:
            raise AdapterError(f"{known.file}: module {path} has no {part}, although it has {known.name}.")
    for part in parts.keys() - set(wanted):
        raise AdapterError(f"{known.file}: tensor {parts[part].name} is there, but the configuration has no use_dora.")
    a, b, magnitude = parts["lora_A"], parts["lora_B"], parts.get("lora_magnitude_vector")
    for ref in (a, b):
        if len(ref.shape) != 2:
            raise UnsupportedError(
                f"{ref.file}: {ref.name} has shape {list(ref.shape)}: LoRA on layers other than Linear is not "
                "supported yet."
            )
    rank = settings.rank_of(path)
    if a.shape[0] != rank or b.shape[1] != rank:
        raise AdapterError(
            f"{a.file}: {a.name} is {list(a.shape)} and {b.name} is {list(b.shape)}, expected rank {rank} as the "
            "configuration says (r, rank_pattern)."
        )
    if magnitude is not None and magnitude.shape != (b.shape[0],):
        raise AdapterError(f"{a.file}: {magnitude.name} has shape {list(magnitude.shape)}, expected [{b.shape[0]}].")
    return Module(path, rank, settings.scaling_of(path), a, b, magnitude)
