"""GGUF files of a LoRA, as llama.cpp and Ollama load them.

Version 3 of the format, little-endian: a header with typed keys, a list of tensors with their sizes fastest first, and
their values, each aligned to 32 bytes (ggml's ``docs/gguf.md``). The reader scales by alpha/r with one alpha for all,
and by 1 where alpha is 0 (``src/llama-adapter.h``); the scaling is in ``lora_b``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from mapconv.checkpoint.model_config import read_model_config
from mapconv.exporting.ggufnames import ARCHITECTURES, gguf_name, heads_of, interleaved
from mapconv.exporting.plain import Export, PlainModule
from mapconv.placement.adapters import PlacedAdapter

_ALIGNMENT = 32
_UINT32, _FLOAT32, _STRING = 4, 6, 8
#: ggml's numbers of the dtypes, and those of a whole file of them (``general.file_type``).
_TENSOR_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}
_FILE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}


@dataclass(frozen=True)
class _Factor:
    """One tensor of the file, by the module that it is made from."""

    name: str
    shape: tuple[int, int]
    module: PlainModule
    first: bool

    def nbytes(self, dtype: torch.dtype) -> int:
        return self.shape[0] * self.shape[1] * dtype.itemsize


def gguf_names(placed: PlacedAdapter) -> dict[tuple[str, int | None], str]:
    """What llama.cpp calls each module's weight, where it has one."""
    config = _config(placed)
    names = {item.key: gguf_name(item.module.path, config) for item in placed.modules}
    return {key: name for key, name in names.items() if name is not None}


def write_gguf(export: Export, out: Path) -> None:
    """Write the file that ``llama-cli --lora`` takes."""
    config = _config(export.placed)
    architecture, _ = ARCHITECTURES[str(config["model_type"])]
    dtype = export.reader.read(export.modules[0].A).dtype
    names = gguf_names(export.placed)
    factors = [factor for module in export.modules for factor in _factors(module, names[module.placed.key])]
    ranks = {module.rank for module in export.modules}
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
        file.write(b"GGUF" + struct.pack("<IQQ", 3, len(factors), len(header)) + b"".join(header))
        offset = 0
        for factor in factors:
            sizes = struct.pack("<IQQ", 2, *reversed(factor.shape))
            file.write(_string(factor.name) + sizes + struct.pack("<IQ", _TENSOR_TYPES[dtype], offset))
            offset += -(-factor.nbytes(dtype) // _ALIGNMENT) * _ALIGNMENT
        _align(file)
        for factor in factors:
            tensor = export.reader.read(factor.module.A if factor.first else factor.module.B)
            heads = None if factor.first else heads_of(factor.name.rpartition(".")[0], factor.shape[0], config)
            file.write(_stored(tensor, factor, heads))
            _align(file)


def _config(placed: PlacedAdapter) -> dict[str, Any]:
    try:
        return read_model_config(placed.target.folder)
    except FileNotFoundError:
        return {}  # llama.cpp then has no architecture for it


def _factors(module: PlainModule, name: str) -> Iterator[_Factor]:
    A, B = module.A.shape, module.B.shape
    # Rows of an embedding's first factor are looked up by their tokens.
    first = (A[1], A[0]) if module.placed.module.embedding else (A[0], A[1])
    yield _Factor(f"{name}.lora_a", first, module, first=True)
    yield _Factor(f"{name}.lora_b", (B[0], B[1]), module, first=False)


def _stored(tensor: torch.Tensor, factor: _Factor, heads: int | None) -> memoryview:
    if factor.first:
        tensor = tensor.T if factor.module.placed.module.embedding else tensor
    elif heads is not None:
        tensor = interleaved(tensor, heads)
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def _align(file: BinaryIO) -> None:
    file.write(b"\0" * (-file.tell() % _ALIGNMENT))


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _key(name: str, kind: int) -> bytes:
    return _string(name) + struct.pack("<I", kind)


def _text(name: str, value: str) -> bytes:
    return _key(name, _STRING) + _string(value)
