"""Safetensors files that are all header: names, dtypes and shapes of any size, and not a byte of data on disk."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path

_SIZES = {"F32": 4, "BF16": 2}


def write_header_only(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str = "BF16") -> None:
    """A sparse file: valid to every reader of headers, and a hole where the values would be."""
    table, position = {}, 0
    for name, shape in shapes.items():
        stop = position + math.prod(shape) * _SIZES[dtype]
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, stop]}
        position = stop
    header = json.dumps(table).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + position)
