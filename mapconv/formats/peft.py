"""PEFT directories: ``adapter_config.json`` beside ``adapter_model.safetensors``."""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Container, Mapping, Sequence
from pathlib import Path

from mapconv.adapter import Adapter, LoraSettings, Module, TensorRef, WholeTensor
from mapconv.checkpoint.headers import read_tensor_file
from mapconv.errors import AdapterError, UnsupportedError
from mapconv.formats.base import CONFIG_FILE, WEIGHTS_FILE, Found
from mapconv.formats.config import parse_settings
from mapconv.formats.experts import unstacked
from mapconv.formats.pickle import PICKLE_FILE, read_pickle, some_tensors
from mapconv.wording import counted

#: PEFT wraps a model twice, and every key of a file starts with the two attribute names.
KEY_PREFIX = "base_model.model."

_PREFIXES = re.compile(rf"(?:{re.escape(KEY_PREFIX)})*")
_FLOATS = ("F32", "F16", "BF16")
#: A LoRA tensor. PEFT strips the adapter's name when it saves; other writers leave it in (`.lora_A.default.weight`).
_FACTOR = re.compile(
    r"(?P<path>.+?)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?(?:\.(?P<leaf>weight|bias))?"
)
#: What Tinker's exports call modules otherwise than transformers does.
_TINKER_NAMES = {"model.unembed_tokens": "lm_head"}
_TOKEN_ROWS = re.compile(r"(?P<path>.+?)(\.token_adapter)?\.trainable_tokens_delta")
#: The adapter's name behind PEFT's wrappers of whole tensors, in files of other writers.
_ADAPTER_NAME = r"(\.modules_to_save|\.trainable_tokens_delta)\.(?:{names})(?=\.|$)"
#: PEFT's wrappers of a base layer, and of one that replaces it; without them, the key is the parameter's name.
_WRAPPED_BASE = re.compile(r"(\.token_adapter)?\.(base_layer|ln_tuning_layers)(?=\.)")


class PeftDirectory:
    """The dialect that PEFT's ``save_pretrained`` writes."""

    def recognise(self, found: Found) -> bool:
        return found.config is not None and "peft_type" in found.config

    def read(self, found: Found, *, allow_pickle: bool = False) -> Adapter:
        settings = parse_settings(found.config or {}, found.path / CONFIG_FILE)
        return peft_adapter(found, settings, read_weights(found, allow_pickle=allow_pickle))


def peft_adapter(found: Found, settings: LoraSettings, tensors: Sequence[TensorRef]) -> Adapter:
    """The adapter that a folder's settings and the tensors of its weights file make, as PEFT reads them.

    Raises:
        AdapterError: a missing, misshapen or doubled tensor.
    """
    modules, whole, others, notes = _sorted(tensors, settings)
    return Adapter(
        path=found.path,
        method="DoRA" if settings.use_dora else "LoRA",
        config=found.config or {},
        settings=settings,
        modules=modules,
        whole=whole,
        others=others,
        base=settings.base,
        revision=settings.revision,
        notes=notes,
    )


def _sorted(
    tensors: Sequence[TensorRef], settings: LoraSettings
) -> tuple[tuple[Module, ...], tuple[WholeTensor, ...], dict[str, TensorRef], tuple[str, ...]]:
    """Modules, whole tensors, all that are not factors; and notes for the user."""
    parts: dict[str, dict[str, TensorRef]] = defaultdict(dict)
    others: list[TensorRef] = []
    names = {"default"}
    prefix = key_prefix(tensors)
    for ref in tensors:
        if ref.dtype not in _FLOATS:
            raise AdapterError(f"{ref.file}: {ref.name} has dtype {ref.dtype}, expected one of {', '.join(_FLOATS)}.")
        match = _FACTOR.fullmatch(ref.name)
        if match is None:
            others.append(ref)
            continue
        names.add(match["adapter"] or "default")
        part = "bias" if match["leaf"] == "bias" else match["part"]
        path = match["path"].removeprefix(prefix)
        path = _TINKER_NAMES.get(path, path)
        if part in parts[path]:
            raise AdapterError(
                f"{ref.file}: {ref.name} and {parts[path][part].name} are the same tensor of one module."
            )
        parts[path][part] = ref
    if not parts:
        raise AdapterError(f"{tensors[0].file} holds no LoRA factors, only {tensors[0].name} and the like.")
    single = unstacked(parts, "lora_A", "lora_B")
    modules = tuple(_module(path, single[path], settings) for path in sorted(single, key=natural_order))
    whole, saved, notes = whole_tensors(others, settings, names, prefix)
    return modules, whole, saved, notes


def key_prefix(tensors: Sequence[TensorRef]) -> str:
    """What the keys of a model's tensors start with: a model that was a PeftModel already has the prefix once more."""
    found = [_PREFIXES.match(ref.name) for ref in tensors]
    wrappings = min(match.end() // len(KEY_PREFIX) for match in found if match is not None)
    return KEY_PREFIX * max(1, wrappings)


def natural_order(path: str) -> tuple[tuple[int, str], ...]:
    """A sort key that puts ``layers.2`` before ``layers.10``."""
    # Of two numbers the longer one is the larger; a hostile one may have more digits than int() takes.
    return tuple((len(part) if part.isdecimal() else sys.maxsize, part) for part in path.split("."))


def weights_name(folder: Path) -> str:
    """The name of the adapter's weights file: the pickle's where there is no other."""
    pickled = not (folder / WEIGHTS_FILE).exists() and (folder / PICKLE_FILE).exists()
    return PICKLE_FILE if pickled else WEIGHTS_FILE


def read_weights(found: Found, *, allow_pickle: bool) -> tuple[TensorRef, ...]:
    """The tensors of an adapter's weights file, at least one.

    Raises:
        AdapterError: none, or a pickle that is not allowed.
    """
    folder = found.path
    weights = folder / weights_name(folder)
    if weights.name == PICKLE_FILE:
        return read_pickle(weights, allow_pickle=allow_pickle)
    if not weights.exists():
        raise AdapterError(f"{folder} has {CONFIG_FILE} but no {WEIGHTS_FILE}: download the weights.")
    # Other dialects have looked at the header already.
    header = found.header
    return some_tensors(header if header is not None and header.path == weights else read_tensor_file(weights))


def _module(path: str, parts: Mapping[str, TensorRef], settings: LoraSettings) -> Module:
    known = next(iter(parts.values()))
    embedding = any(part.startswith("lora_embedding") for part in parts)
    name_A, name_B = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    wanted = [name_A, name_B] + ["lora_magnitude_vector"] * settings.use_dora
    for part in wanted:
        if part not in parts:
            raise AdapterError(f"{known.file}: module {path} has no {part}, although it has {known.name}.")
    for part in parts.keys() - {*wanted, "bias"}:
        raise AdapterError(f"{known.file}: tensor {parts[part].name} contradicts the configuration (use_dora).")
    a, b, magnitude = parts[name_A], parts[name_B], parts.get("lora_magnitude_vector")
    if len(a.shape) < 2 or len(b.shape) != len(a.shape) or any(size != 1 for size in b.shape[2:]):
        raise AdapterError(
            f"{a.file}: {a.name} is {list(a.shape)} and {b.name} is {list(b.shape)}: they make no weight together."
        )
    rank = a.shape[0]
    if len(a.shape) > 2 and b.shape[1] != rank:
        raise UnsupportedError(
            f"{a.file}: {a.name} is {list(a.shape)} and {b.name} is {list(b.shape)}: a convolution with groups > 1, "
            "which has no merge (PEFT refuses it as well)."
        )
    # A stack of experts has its factors side by side, and only the base says how many: checked when it is placed.
    if b.shape[1] != rank or (rank != settings.rank_of(path) and not settings.target_parameters):
        raise AdapterError(
            f"{a.file}: {a.name} is {list(a.shape)} and {b.name} is {list(b.shape)}, expected rank "
            f"{settings.rank_of(path)} as the configuration says (r, rank_pattern)."
        )
    kernel = a.shape[2:]
    _check_shape(magnitude, (1, b.shape[0], *(1 for _ in kernel)) if kernel else (b.shape[0],))
    _check_shape(parts.get("bias"), (b.shape[0],))
    return Module(path, rank, settings.scaling_of(path), a, b, magnitude, parts.get("bias"), embedding)


def _check_shape(ref: TensorRef | None, shape: tuple[int, ...]) -> None:
    if ref is not None and ref.shape != shape:
        raise AdapterError(f"{ref.file}: {ref.name} has shape {list(ref.shape)}, expected {list(shape)}.")


def whole_tensors(
    refs: Sequence[TensorRef], settings: LoraSettings, adapter_names: set[str], prefix: str
) -> tuple[tuple[WholeTensor, ...], dict[str, TensorRef], tuple[str, ...]]:
    """Whole tensors by the parameter that they replace, all of ``refs`` by PEFT's own key, and notes for the user."""
    name = re.compile(_ADAPTER_NAME.format(names="|".join(map(re.escape, sorted(adapter_names)))))
    named = {name.sub(r"\1", ref.name.removeprefix(prefix)): ref for ref in refs}
    found: dict[str, WholeTensor] = {}
    notes = []
    # A saved module's tensor occurs twice where its embedding was resized as well: the trained one comes last and wins.
    for key, ref in sorted(named.items(), key=lambda item: ".modules_to_save." in item[0]):
        if ".original_module." in key:
            notes.append(f"{ref.name} is PEFT's copy of the untrained module, and has no effect")
            continue
        if ".lora_" in key or key.startswith("lora_"):
            raise AdapterError(
                f"{ref.file}: tensor {ref.name} is not part of a LoRA or DoRA module (expected ….lora_A.weight, "
                "….lora_B.weight, ….lora_embedding_A, ….lora_embedding_B or ….lora_magnitude_vector)."
            )
        rows = _TOKEN_ROWS.fullmatch(key)
        if rows is not None:
            parameter = f"{rows['path']}.weight"
            found[key] = WholeTensor(parameter, ref, False, _rows_of(rows["path"], ref, settings))
            continue
        parameter = _WRAPPED_BASE.sub("", key.replace(".modules_to_save.", "."))
        # PEFT loads a tensor of a saved module into a copy of that module, any other into the base's own parameter.
        module = parameter.rpartition(".")[0]
        own_copy = any(f".{saved}." in f".{module}." for saved in settings.modules_to_save)
        found[parameter] = WholeTensor(parameter, ref, in_place=not own_copy)
    if len(prefix) > len(KEY_PREFIX):
        notes.append(
            f"its keys have PEFT's prefix {prefix.count(KEY_PREFIX)} times ({prefix}…), and are read without it"
        )
    whole = tuple(found[key] for key in sorted(found, key=natural_order))
    return whole, {_saved_key(key, named): ref for key, ref in named.items()}, tuple(notes)


def _saved_key(key: str, keys: Container[str]) -> str:
    """The key under which PEFT saves and finds a tensor: a wrapper's name shows only beside the plain key."""
    plain = key.replace(".modules_to_save.", ".")
    return KEY_PREFIX + (key if plain in keys else plain)


def _rows_of(path: str, ref: TensorRef, settings: LoraSettings) -> tuple[int, ...]:
    """The indices that go with a tensor of trained rows: those of the embedding's name, or of the bare list."""
    named = [rows for name, rows in settings.token_rows.items() if name and f".{path}".endswith(f".{name}")]
    rows = (named or [settings.token_rows.get("", ())])[0]
    if len(ref.shape) != 2 or len(rows) != ref.shape[0]:
        raise AdapterError(
            f"{ref.file}: {ref.name} has shape {list(ref.shape)}, but trainable_token_indices names "
            f"{counted(len(rows), 'token')}."
        )
    return rows
