"""The modules of an export: converted once, kept in a file of their own, and read again by the format's writer.

A format that takes one rank must know the largest before its first tensor, and one whose header comes first all shapes;
so every module is converted into a spool, whose memory does not grow with the adapter, and then written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import pad

from mapconv.adapter import MapModule, TensorRef
from mapconv.algebra.fingerprint import Fingerprint
from mapconv.checkpoint.headers import read_tensor_file
from mapconv.checkpoint.reader import TensorReader
from mapconv.checkpoint.writer import SpooledFile
from mapconv.formats.mapdir import needs_magnitude
from mapconv.placement.adapters import PlacedAdapter
from mapconv.placement.weights import PlacedModule, WeightView
from mapconv.refit.converted import Converted
from mapconv.refit.norms import BaseNorms
from mapconv.refit.plan import UpgradePlan
from mapconv.refit.writer import converted_modules


class NoNorms(BaseNorms):
    """The norms of weights that nobody asks for: an export keeps a LoRA's factors, which takes nothing of the base."""

    def __init__(self) -> None:
        self.notes: tuple[str, ...] = ()

    def __getitem__(self, weight: WeightView) -> Fingerprint:
        return Fingerprint(1.0)

    def missing(self, weights: Iterable[WeightView]) -> list[WeightView]:
        return []

    def load(self, weights: Iterable[WeightView], reader: TensorReader) -> None:
        pass


@dataclass(frozen=True)
class PlainModule:
    """One module as it is written: W0 + B·A with every scaling in B, or a DoRA of these with ``magnitude`` (out,)."""

    placed: PlacedModule
    scalars: MapModule
    A: TensorRef
    B: TensorRef
    magnitude: TensorRef | None

    @property
    def path(self) -> str:
        return self.placed.module.path

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def kernel(self) -> tuple[int, ...]:
        """A convolution's, else empty."""
        return self.placed.module.lora_A.shape[2:]

    @property
    def inputs(self) -> int:
        """Of the layer: channels of a convolution, columns of a matrix."""
        return self.placed.module.lora_A.shape[1]


@dataclass(frozen=True)
class Export:
    """Everything that a format's writer needs.

    Args:
        placed: the adapter on its base.
        modules: in the adapter's order.
        reader: of their factors.
        rank: of every module in a format that takes one; None: each its own.
        base: what the result names as its base.
        experts: the layout of experts that the modules are in, as ``exporting.experts`` has them.
        leaves: of names that stand for all experts of the model in it.
    """

    placed: PlacedAdapter
    modules: tuple[PlainModule, ...]
    reader: TensorReader
    rank: int | None
    base: str
    experts: str | None = None
    leaves: frozenset[str] = frozenset()

    def factors(self, module: PlainModule) -> tuple[torch.Tensor, torch.Tensor]:
        """A (r, in) and B (out, r) as matrices; zeros bring them to the one rank."""
        A, B = self.reader.read(module.A), self.reader.read(module.B)
        missing = 0 if self.rank is None else self.rank - module.rank
        return (pad(A, (0, 0, 0, missing)), pad(B, (0, missing))) if missing else (A, B)

    def magnitude(self, module: PlainModule) -> torch.Tensor | None:
        return None if module.magnitude is None else self.reader.read(module.magnitude)


class Spool:
    """The converted modules of a plan, in a safetensors file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._done: list[tuple[PlacedModule, Converted]] = []

    def fill(self, plan: UpgradePlan, *, quiet: bool) -> None:
        """Convert every module of the plan into the file."""
        file = SpooledFile(self.path)
        try:
            for number, (item, result) in enumerate(converted_modules(plan, NoNorms(), label="exporting", quiet=quiet)):
                file.append(f"{number}.A", result.A)
                file.append(f"{number}.B", result.B)
                if result.magnitude is not None:
                    file.append(f"{number}.magnitude", result.magnitude)
                self._done.append((item, result.without_factors()))
            file.finish()
        finally:
            file.close()

    def modules(self) -> Iterator[PlainModule]:
        refs = {ref.name: ref for ref in read_tensor_file(self.path).tensors}
        # A refit brings the magnitude along with which stock PEFT computes any gain; a plain LoRA's needs none.
        is_dora = needs_magnitude([result.scalars for _, result in self._done])
        for number, (item, result) in enumerate(self._done):
            A, B = refs[f"{number}.A"], refs[f"{number}.B"]
            magnitude = refs[f"{number}.magnitude"] if is_dora else None
            yield PlainModule(item, result.scalars, A, B, magnitude)
