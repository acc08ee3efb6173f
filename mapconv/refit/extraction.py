"""What a finetune changed, and each changed weight as a module in MAP form.

Both checkpoints are read a row block at a time. A first look finds what differs at all; a tensor that does is left at
its first block, so that it costs little.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from mapconv.adapter import Direction
from mapconv.algebra.fingerprint import Fingerprint
from mapconv.algebra.moments import InputRoot, Statistics
from mapconv.algebra.norms import all_finite, row_blocks
from mapconv.checkpoint.reader import TORCH_DTYPES, TensorReader, block_elements, row_ranges
from mapconv.errors import CheckpointError
from mapconv.placement.finetunes import Finetune, MatrixPair, WholePair
from mapconv.placement.matrices import MatrixRows
from mapconv.placement.weights import PlacedModule, in_stacks
from mapconv.refit.converted import Converted, refitted_module
from mapconv.refit.plan import Dtype
from mapconv.refit.rows_direction import directed_module
from mapconv.refit.solving import Wanted
from mapconv.refit.targets.base import BLOCK_ELEMENTS
from mapconv.refit.targets.difference import Difference


@dataclass(frozen=True)
class ExtractOptions:
    """What the caller asked for; with a ``tolerance`` the rank is the least that meets it, up to ``max_rank``."""

    rank: int
    tolerance: float | None
    max_rank: int
    direction: Direction
    lora_compatible: bool
    dtype: Dtype
    device: torch.device
    statistics: Statistics | None = None

    def stored_dtype(self, pair: MatrixPair) -> torch.dtype:
        return TORCH_DTYPES[pair.tuned.dtype] if self.dtype == "auto" else getattr(torch, self.dtype)


@dataclass(frozen=True)
class Changes:
    """What differs between two models. ``cosine`` is that of their matrices, by a sample of their rows."""

    matrices: tuple[MatrixPair, ...]
    wholes: tuple[WholePair, ...]
    unchanged: int
    cosine: float


@dataclass(frozen=True)
class Extracted:
    """One module, with the fingerprint of T, ‖T − W0‖/‖W0‖, and the part of T − W0 that is T's own rounding.

    ``floor`` is in the unit that was minimised: of the layer's outputs where its inputs are known.
    """

    converted: Converted
    tuned: Fingerprint
    change: float
    floor: float

    def without_factors(self) -> Extracted:
        """The numbers alone."""
        return replace(self, converted=self.converted.without_factors())

    def told(self) -> tuple[float, float]:
        """ε, and the part of it that is rounding."""
        return self.converted.scalars.error or 0.0, self.floor


def find_changes(found: Finetune, readers: tuple[TensorReader, TensorReader]) -> Changes:
    """Compare every pair, as far as it takes.

    Raises:
        CheckpointError: a whole tensor of the finetune that holds NaN or infinity.
    """
    matrices, inner, squares, unchanged = [], 0.0, [0.0, 0.0], 0
    for stack in in_stacks(found.matrices, lambda pair: pair.experts):
        compared = [_compare(pair, readers) for pair in stack]
        for _, first in compared:
            inner += first[0]
            squares = [squares[0] + first[1], squares[1] + first[2]]
        # PEFT has a LoRA for all experts of a stack or for none.
        if any(differs for differs, _ in compared):
            matrices += stack
        else:
            unchanged += 1
    wholes = [pair for pair in found.wholes if _differs(pair, readers)]
    length = (squares[0] * squares[1]) ** 0.5
    unchanged += len(found.wholes) - len(wholes)
    return Changes(tuple(matrices), tuple(wholes), unchanged, inner / length if length else 1.0)


class Extractor:
    """Turns changed weights into modules, one at a time; safe to call from several threads."""

    def __init__(self, readers: tuple[TensorReader, TensorReader], options: ExtractOptions) -> None:
        self._readers, self._options = readers, options

    def extract_all(self, stack: Sequence[tuple[PlacedModule, MatrixPair, InputRoot | None]]) -> list[Extracted]:
        """One module, or the experts of a stack, whose factors get one rank."""
        made = [self.extract(*item) for item in stack]
        rank = max(len(item.converted.A) for item in made)
        return [replace(item, converted=item.converted.with_rank(rank)) for item in made]

    def extract(self, placed: PlacedModule, pair: MatrixPair, root: InputRoot | None = None) -> Extracted:
        """The closest MAP weight to the finetune's; errors are weighed by ``root``, the root of its inputs' moment.

        A tolerance is of what is not rounding: ε² may be tolerance²·(1 − floor²) + floor².
        """
        options = self._options
        target = Difference(*(MatrixRows(v, r) for v, r in zip((pair.base, pair.tuned), self._readers, strict=True)))
        floor = target.floor(root)
        tolerance = options.tolerance
        if tolerance is not None:
            tolerance = (tolerance**2 * (1 - floor**2) + floor**2) ** 0.5
        gain = 1.0 if options.lora_compatible else None
        wanted = Wanted(pair.path, options.rank, tolerance, options.max_rank, gain, options.stored_dtype(pair))
        if options.direction == "dora":
            converted = directed_module(placed, target, wanted, target.base, root)
        else:
            solved = target if options.device.type == "cpu" else target.dense(options.device)
            converted = refitted_module(placed, solved, wanted, target.base, root)
        norms = target.squared_norms()
        change = (norms[0] / norms[2]) ** 0.5 if norms[2] else float("inf")
        return Extracted(converted, target.tuned, change, floor)

    def work(self, pair: MatrixPair) -> int:
        """Bytes of memory that one module takes: both weights as stored, and more where inputs weigh the errors."""
        held = pair.base.nbytes + pair.tuned.nbytes + 16 * BLOCK_ELEMENTS
        dense = self._options.statistics is not None or self._options.device.type != "cpu"
        return held + (16 * pair.base.numel if dense else 0)


def _compare(pair: MatrixPair, readers: tuple[TensorReader, TensorReader]) -> tuple[bool, tuple[float, ...]]:
    """Whether T differs from W0, and (⟨T, W0⟩, ‖T‖², ‖W0‖²) of the first block of rows."""
    base, tuned = (MatrixRows(v, r, held=0) for v, r in zip((pair.base, pair.tuned), readers, strict=True))
    first: tuple[float, ...] | None = None
    for start, stop in row_blocks(*pair.base.shape):
        W, T = base.rows(start, stop), tuned.rows(start, stop)
        if first is None:
            first = (
                float((T.double() * W.double()).sum()),
                float(T.double().square().sum()),
                float(W.double().square().sum()),
            )
        if not _equal(W, T, pair.tuned.dtype):
            return True, first
    return False, first or (0.0, 0.0, 0.0)


def _equal(base: torch.Tensor, tuned: torch.Tensor, dtype: str) -> bool:
    """Whether values are the same, or the base's rounded to the dtype that the finetune is stored in."""
    if torch.equal(base, tuned):
        return True
    kind = TORCH_DTYPES.get(dtype)
    narrow = kind in (torch.bfloat16, torch.float16)
    return narrow and kind is not None and torch.equal(base.to(kind), tuned.to(kind))


def _differs(pair: WholePair, readers: tuple[TensorReader, TensorReader]) -> bool:
    differs = pair.base is None
    # A tensor that differs is read to its end all the same, for NaN that would otherwise be carried over. Values that
    # are equal to the base's are none.
    for T, W in _block_pairs(pair, readers):
        if W is not None and torch.equal(W, T):
            continue
        if T.is_floating_point() and not all_finite(T):
            raise CheckpointError(f"{pair.tuned.file}: {pair.tuned.name} holds NaN or infinity.")
        differs = differs or (W is not None and not _equal(W, T, pair.tuned.dtype))
    return differs


def _block_pairs(
    pair: WholePair, readers: tuple[TensorReader, TensorReader]
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """The finetune's values and the base's, flat, a block at a time."""
    buffers = [torch.empty(8 * block_elements(ref), dtype=torch.uint8) for ref in (pair.tuned, pair.base or pair.tuned)]
    for start, stop in row_ranges(pair.tuned):
        tuned = readers[1].read_range(pair.tuned, start, stop, buffers[0])
        base = None if pair.base is None else readers[0].read_range(pair.base, start, stop, buffers[1])
        if base is not None and base.dtype != tuned.dtype:
            base, tuned = base.float(), tuned.float()
        yield tuned, base
