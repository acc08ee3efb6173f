"""The factors of a stack of experts as PEFT has them, made of those of its parts, and a part's out of a stack.

A stack has A (E·r, in) with the experts in turn and B (out, r·E) with the expert counting fastest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mapconv.adapter import TensorRef
from mapconv.checkpoint.codecs.base import Bytes, EncodedTensor
from mapconv.checkpoint.derived import Computed, derived


@dataclass(frozen=True)
class Block:
    """One part of one expert: its factors, where its rank begins in the expert's, and its rows in the expert's.

    Its rows are ``first_row``, ``first_row + step`` and so on; ``scale`` multiplies its update.
    """

    A: TensorRef
    B: TensorRef
    expert: int
    first_rank: int
    first_row: int
    step: int = 1
    scale: float = 1.0


@dataclass(frozen=True)
class _Stack(Computed):
    blocks: tuple[Block, ...]
    experts: int
    rank: int


@dataclass(frozen=True)
class _StackedA(_Stack):
    def matrix(self, reader: Bytes) -> torch.Tensor:
        stack = torch.zeros(self.experts, self.rank, self.blocks[0].A.shape[1])
        for block in self.blocks:
            stack[block.expert, block.first_rank : block.first_rank + block.A.shape[0]] = reader.read(block.A).float()
        return stack.flatten(0, 1)


@dataclass(frozen=True)
class _StackedB(_Stack):
    height: int

    def matrix(self, reader: Bytes) -> torch.Tensor:
        stack = torch.zeros(self.height, self.rank, self.experts)
        for block in self.blocks:
            rows, rank = block.B.shape
            stop = block.first_row + block.step * rows
            part = stack[block.first_row : stop : block.step, block.first_rank : block.first_rank + rank, block.expert]
            part.copy_(reader.read(block.B).float() * block.scale)
        return stack.flatten(1)


@dataclass(frozen=True)
class _ExpertRows(Computed):
    """Some rows of one expert's B in a stack."""

    rank: int
    expert: int
    start: int

    def rows(self, reader: Bytes, start: int, stop: int, out: torch.Tensor) -> None:
        (whole,) = self.stored
        # Kept for the stack, as its experts are read one after another.
        stack = reader.kept(whole, "stack", lambda: reader.read(whole).float())
        experts = stack.view(whole.shape[0], self.rank, -1)
        out.copy_(experts[self.start + start : self.start + stop, :, self.expert])


def stacked(
    name: str, blocks: Sequence[Block], *, experts: int, rank: int, height: int
) -> tuple[EncodedTensor, EncodedTensor]:
    """(A, B) of a stack of ``experts`` weights of ``height`` rows, each with ``rank`` for its parts; zero elsewhere."""
    width = blocks[0].A.shape[1]
    parts = tuple(blocks)
    # The first stored tensor says the file and the dtype.
    refs = [tuple(dict.fromkeys(ref for block in parts for ref in getattr(block, which).stored)) for which in "AB"]
    A = derived(name, (experts * rank, width), _StackedA(refs[0], parts, experts, rank))
    B = derived(name, (height, rank * experts), _StackedB(refs[1], parts, experts, rank, height))
    return A, B


def expert_rows(B: TensorRef, rank: int, expert: int, start: int, stop: int) -> EncodedTensor:
    """Rows ``start`` to ``stop`` of the B of one expert in a stack."""
    return derived(B.name, (stop - start, rank), _ExpertRows((B,), rank, expert, start))
