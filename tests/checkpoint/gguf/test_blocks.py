"""Every block type against gguf's own reader: from its stored values, and anew where it is installed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mapconv.checkpoint.gguf.blocks import EXPAND
from mapconv.checkpoint.gguf.types import BLOCK_TYPES, KNOWN_TYPES, BlockType

STORED = Path(__file__).parent / "blocks.safetensors"
TYPES = {kind.name: kind for kind in BLOCK_TYPES.values()}


def blocks_of(kind: BlockType, count: int, seed: int = 0) -> torch.Tensor:
    """Random bytes; every one is a block, and some scales are huge, subnormal or no number."""
    return torch.randint(0, 256, (count, kind.nbytes), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def decoded(kind: BlockType, blocks: torch.Tensor) -> torch.Tensor:
    out = torch.empty(len(blocks), kind.elements)
    EXPAND[kind.name](blocks, out)
    return out


def by_library(name: str, blocks: torch.Tensor) -> torch.Tensor:
    import gguf
    import numpy as np

    with np.errstate(all="ignore"):
        values = gguf.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[name])
    return torch.from_numpy(np.ascontiguousarray(values)).view(len(blocks), -1)


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.equal(found.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    assert torch.equal(found[numbers].view(torch.int32), expected[numbers].view(torch.int32))


@pytest.mark.parametrize("name", TYPES)
def test_stored_values(name):
    table = load_file(STORED)
    assert_same_bits(decoded(TYPES[name], table[f"{name}.blocks"]), table[f"{name}.values"])


@pytest.mark.parametrize("name", TYPES)
def test_library(name):
    gguf = pytest.importorskip("gguf")
    kind = TYPES[name]
    number = gguf.GGMLQuantizationType[name]
    assert BLOCK_TYPES[int(number)] is kind
    assert gguf.GGML_QUANT_SIZES[number] == (kind.elements, kind.nbytes)
    blocks = blocks_of(kind, 2_000, seed=1)
    assert_same_bits(decoded(kind, blocks), by_library(name, blocks))


def test_the_others_are_known_by_name():
    gguf = pytest.importorskip("gguf")
    names = {number: BLOCK_TYPES[number].name for number in BLOCK_TYPES} | KNOWN_TYPES
    for number in gguf.GGMLQuantizationType:
        assert names.get(int(number), number.name) == number.name


if __name__ == "__main__":  # python -m tests.checkpoint.gguf.test_blocks: writes what the tests find without gguf
    made = {name: blocks_of(kind, max(2, 64 // kind.elements)) for name, kind in TYPES.items()}
    values = {f"{name}.values": by_library(name, blocks).clone() for name, blocks in made.items()}
    save_file({f"{name}.blocks": blocks for name, blocks in made.items()} | values, STORED)
