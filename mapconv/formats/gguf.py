"""LoRA adapters of llama.cpp: one GGUF file, under llama.cpp's names and in its order of rows.

``general.type`` is ``adapter``, and one ``adapter.lora.alpha`` speaks for all modules (0 or absent: the scaling is 1).
Rows of q and k are interleaved by heads as in a model's file, and the first factor of an embedding is transposed. The
experts of a layer are one stack, with A (E, r, in) and B (E, out, r) (llama.cpp, ``convert_lora_to_gguf.py``,
``src/llama-adapter.cpp`` and ``src/llama-graph.cpp``).
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from mapconv.adapter import Adapter, Module, TensorRef
from mapconv.checkpoint.derived import TransposedTensor, derived
from mapconv.checkpoint.gguf.families import FAMILIES, MIXTURES, Family
from mapconv.checkpoint.gguf.header import GgufFile, GgufTensor, is_gguf, read_gguf
from mapconv.errors import AdapterError, UnsupportedError
from mapconv.formats.base import Found, adapter_of
from mapconv.formats.experts import matrix_of
from mapconv.spelling import HeadRows
from mapconv.untrusted.schema import shown

_PART = re.compile(r"(?:blk\.(?P<layer>[0-9]{1,5})\.)?(?P<name>[a-z_]+)\.weight\.(?P<part>lora_[ab])")
_ENDS = {"token_embd": "model.embed_tokens", "output": "lm_head"}
_DTYPES = ("F32", "F16", "BF16")


class GgufLora:
    """The dialect that llama.cpp's ``convert_lora_to_gguf.py`` writes."""

    def recognise(self, found: Found) -> bool:
        return is_gguf(found.path) and found.path.is_file()

    def read(self, found: Found, *, allow_pickle: bool = False) -> Adapter:
        path = found.path
        file = read_gguf(path)
        family, alpha = _family(file), _alpha(file)
        parts: dict[str, dict[str, TensorRef]] = defaultdict(dict)
        interleaved: dict[str, HeadRows] = {}
        for tensor in file.tensors:
            name, part, heads = _named(file, family, tensor)
            parts[name][part] = _plain(path, tensor)
            if heads:
                interleaved[name] = heads
        if not parts:
            raise AdapterError(f"{path} holds no tensors.")
        modules = tuple(
            replace(_module(path, name, tensors, alpha), interleaved=interleaved.get(name))
            for whole, of_all in parts.items()
            for name, tensors in _apart(path, whole, of_all)
        )
        return adapter_of(path, modules, "llama.cpp (GGUF)")


def _family(file: GgufFile) -> Family:
    metadata = file.metadata
    if metadata.get("general.type") != "adapter":
        raise AdapterError(f"{file.path} holds a {shown(metadata.get('general.type', 'model'))}, expected an adapter.")
    if metadata.get("adapter.type") != "lora":
        raise UnsupportedError(f"{file.path}: adapter.type is {shown(metadata.get('adapter.type'))}, expected lora.")
    architecture = metadata.get("general.architecture")
    family = FAMILIES.get(architecture) if isinstance(architecture, str) else None
    if family is None:
        raise UnsupportedError(
            f"{file.path} is for the architecture {shown(architecture)}, and mapconv knows {', '.join(FAMILIES)}."
        )
    return family


def _alpha(file: GgufFile) -> float:
    alpha = file.metadata.get("adapter.lora.alpha", 0.0)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise AdapterError(f"{file.path}: adapter.lora.alpha is {shown(alpha)}, expected a number.")
    return float(alpha)


def _named(file: GgufFile, family: Family, tensor: GgufTensor) -> tuple[str, str, HeadRows | None]:
    """(transformers' path, the part, the order of its rows where it is another)."""
    match = _PART.fullmatch(tensor.name)
    name = "" if match is None else match["name"]
    if match is not None and match["layer"] is None and name in _ENDS:
        return _ENDS[name], match["part"], None
    mixture = MIXTURES.get(str(file.metadata["general.architecture"]), family)
    names = {**family.layer, **mixture.layer, **mixture.experts}
    if match is None or match["layer"] is None or name not in names:
        raise UnsupportedError(
            f"{file.path}: {tensor.name} is not a LoRA of a layer of {family.model_class} as mapconv knows it."
        )
    heads = {"attn_q": HeadRows("q"), "attn_k": HeadRows("k")}.get(name) if family.interleaved else None
    return f"model.layers.{int(match['layer'])}.{names[name]}", match["part"], heads


def _apart(path: Path, name: str, parts: dict[str, TensorRef]) -> Iterator[tuple[str, dict[str, TensorRef]]]:
    """The factors of each expert of a stack by its own name; what is no stack, as it is."""
    if "*" not in name:
        yield name, parts
        return
    shapes = {part: ref.shape for part, ref in parts.items()}
    if {len(shape) for shape in shapes.values()} != {3} or len({shape[0] for shape in shapes.values()}) != 1:
        known = ", ".join(f"{ref.name} {list(ref.shape)}" for ref in parts.values())
        raise AdapterError(f"{path}: {known} make no stack of experts' factors (E, r, in) and (E, out, r).")
    for number in range(next(iter(shapes.values()))[0]):
        yield (
            name.replace("*", str(number)),
            {part: matrix_of(ref, number, 0, ref.shape[1]) for part, ref in parts.items()},
        )


def _plain(path: Path, tensor: GgufTensor) -> TensorRef:
    if tensor.type.name not in _DTYPES:
        raise UnsupportedError(
            f"{path}: {tensor.name} is stored as {tensor.type.name}, expected one of {', '.join(_DTYPES)}: convert the "
            "adapter with --outtype f16 or f32."
        )
    return TensorRef(path, tensor.name, tensor.type.name, tensor.shape, tensor.start)


def _module(path: Path, name: str, parts: dict[str, TensorRef], alpha: float) -> Module:
    if set(parts) != {"lora_a", "lora_b"}:
        known = next(iter(parts.values())).name
        raise AdapterError(f"{path}: {known} has no counterpart (lora_a and lora_b): the file is incomplete.")
    A, B = parts["lora_a"], parts["lora_b"]
    embedding = name == _ENDS["token_embd"]
    if embedding and len(A.shape) == 2:
        A = derived(A.name, A.shape[::-1], TransposedTensor((A,)))
    if len(A.shape) != 2 or len(B.shape) != 2 or A.shape[0] != B.shape[1] or not A.shape[0]:
        raise AdapterError(f"{path}: {A.name} is {list(A.shape)} and {B.name} is {list(B.shape)}: no factors.")
    rank = A.shape[0]
    return Module(name, rank, alpha / rank if alpha else 1.0, A, B, embedding=embedding)
