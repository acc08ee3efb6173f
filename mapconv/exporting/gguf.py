"""GGUF files of a LoRA, as llama.cpp and Ollama load them.

Version 3 of the format, little-endian: a header with typed keys, a list of tensors with their sizes fastest first, and
their values, each aligned to 32 bytes (ggml's ``docs/gguf.md``). The reader scales by alpha/r with one alpha for all,
and by 1 where alpha is 0 (``src/llama-adapter.h``); the scaling is in ``lora_b``. The factors of all experts of a layer
are (E, r, in) and (E, out, r), of which the matrices that a token chose are multiplied (``src/llama-graph.cpp``,
``build_lora_mm_id``).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from mapconv.exporting.ggufnames import ARCHITECTURES, gguf_config, gguf_name, heads_of, interleaved, layer_of
from mapconv.exporting.plain import Export, PlainModule
from mapconv.exporting.stacks import apart
from mapconv.placement.adapters import PlacedAdapter

_ALIGNMENT = 32
_UINT32, _FLOAT32, _STRING = 4, 6, 8
#: ggml's numbers of the dtypes, and those of a whole file of them (``general.file_type``).
_TENSOR_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}
_FILE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the file: what it is called there, and how it is made."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]

    def nbytes(self, dtype: torch.dtype) -> int:
        return math.prod(self.shape) * dtype.itemsize


def gguf_names(placed: PlacedAdapter) -> dict[tuple[str, int | None], str]:
    """What llama.cpp calls each module's weight, where it has one."""
    config = gguf_config(placed)
    names = {item.key: gguf_name(item.module.path, config) for item in placed.modules}
    return {key: name for key, name in names.items() if name is not None}


def write_gguf(export: Export, out: Path) -> None:
    """Write the file that ``llama-cli --lora`` takes."""
    config = gguf_config(export.placed)
    architecture, _ = ARCHITECTURES[str(config["model_type"])]
    dtype = export.reader.read(export.modules[0].A).dtype
    modules, stacks = apart(export)
    names = gguf_names(export.placed)
    tensors = [tensor for module in modules for tensor in _factors(export, module, names[module.placed.key], config)]
    for path, A, B in stacks:
        name = f"blk.{layer_of(path)}.{path.rpartition('.')[2]}.weight"
        for part, factor in (("lora_a", A), ("lora_b", B)):
            tensors.append(_Tensor(f"{name}.{part}", tuple(factor.shape), lambda factor=factor: factor))
    ranks = {module.rank for module in modules} if export.rank is None else {export.rank}
    # One alpha serves one rank alone; with 0 the reader takes the factors as they are.
    alpha = float(ranks.pop()) if len(ranks) == 1 else 0.0
    header = [
        _text("general.architecture", architecture),
        _text("general.type", "adapter"),
        _text("general.name", export.placed.adapter.path.name),
        _key("general.file_type", _UINT32) + struct.pack("<I", _FILE_TYPES[dtype]),
        _text("adapter.type", "lora"),
        _key("adapter.lora.alpha", _FLOAT32) + struct.pack("<f", alpha),
    ]
    with open(out, "xb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(header)) + b"".join(header))
        offset = 0
        for tensor in tensors:
            sizes = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape))
            file.write(_string(tensor.name) + sizes + struct.pack("<IQ", _TENSOR_TYPES[dtype], offset))
            offset += -(-tensor.nbytes(dtype) // _ALIGNMENT) * _ALIGNMENT
        _align(file)
        for tensor in tensors:
            file.write(tensor.make().contiguous().view(-1).view(torch.uint8).numpy().data)
            _align(file)


def _factors(export: Export, module: PlainModule, name: str, config: Mapping[str, Any]) -> Iterator[_Tensor]:
    embedding = module.placed.module.embedding
    rank, height, width = export.rank or module.rank, module.B.shape[0], module.A.shape[1]
    heads = heads_of(name, height, config)

    def first() -> torch.Tensor:
        A, _ = export.factors(module)
        # Rows of an embedding's first factor are looked up by their tokens.
        return A.T if embedding else A

    def second() -> torch.Tensor:
        _, B = export.factors(module)
        return B if heads is None else interleaved(B, heads)

    yield _Tensor(f"{name}.lora_a", (width, rank) if embedding else (rank, width), first)
    yield _Tensor(f"{name}.lora_b", (height, rank), second)


def _align(file: BinaryIO) -> None:
    file.write(b"\0" * (-file.tell() % _ALIGNMENT))


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _key(name: str, kind: int) -> bytes:
    return _string(name) + struct.pack("<I", kind)


def _text(name: str, value: str) -> bytes:
    return _key(name, _STRING) + _string(value)
