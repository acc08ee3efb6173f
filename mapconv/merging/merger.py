"""Compute merged tensors, row block by row block, from a plan's jobs: read, update in float32, round once, write.

Each thread that runs jobs has its own scratch memory, which is all the memory that a merge needs beside the factors.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mapconv.adapter import TensorRef
from mapconv.algebra.dora import column_scales, row_scales
from mapconv.algebra.fingerprint import Fingerprint
from mapconv.algebra.increments import Increment, ProductIncrement
from mapconv.algebra.norms import BLOCK_ELEMENTS, all_finite, product_norm, row_blocks
from mapconv.checkpoint.codecs.base import EncodedTensor
from mapconv.checkpoint.reader import TORCH_DTYPES, TensorReader, block_elements, row_ranges
from mapconv.checkpoint.writer import FixedFile, NoFile
from mapconv.errors import AdapterError, CheckpointError, MapconvError, OutputError
from mapconv.merging.biases import bias_update
from mapconv.merging.buffers import Buffers
from mapconv.merging.codes import encode
from mapconv.merging.plan import ConvertJob, CopyJob, LowRankUpdate, MergeJob
from mapconv.merging.rounding import Feedback
from mapconv.merging.survival import Gauge, Survival, total
from mapconv.merging.updates import Update, WholeUpdate
from mapconv.placement.factors import FactorLoader
from mapconv.placement.tuned import TunedWeights
from mapconv.placement.weights import PlacedModule, WeightView, read_rows, stored_blocks

#: ‖Δ‖ comes from a Gram matrix of the stored factors, whose rounding its conditioning can enlarge.
DIRECTION_TOLERANCE = 1e-6


@dataclass(frozen=True)
class MergedTensor:
    """One tensor that a merge changed: how far, and how far rounding to the output's dtype moved it again.

    ``dtype`` is a storage's name where it is in codes, of which ``saturated`` values lie beyond what they reach.
    ``base`` has the fingerprint of the base rows that each adapted weight has in this tensor, by the weight's identity.
    """

    tensor: str
    modules: tuple[str, ...]
    dtype: str
    survival: Survival
    base: Mapping[tuple, Fingerprint] = field(default_factory=dict)
    saturated: int = 0

    @property
    def update_norm(self) -> float:
        return self.survival.update_square**0.5

    @property
    def rounding_norm(self) -> float:
        return self.survival.error_square**0.5

    @property
    def rounding_error(self) -> float:
        """‖W'_written − W'‖ / ‖W' − W0‖: what rounding to the output dtype costs, in units of the update."""
        return self.survival.error

    def to_dict(self) -> dict[str, Any]:
        names = {"tensor": self.tensor, "modules": list(self.modules), "dtype": self.dtype}
        return names | {
            "update_norm": self.update_norm,
            "rounding_norm": self.rounding_norm,
            "rounding_error": self.rounding_error,
            "saturated": self.saturated,
            "changed": self.survival.changed_share,
            "projection": self.survival.projection,
        }


def survival_record(merged: Iterable[MergedTensor]) -> dict[str, Any]:
    """What ``map_merge.json`` keeps of the merged tensors: what survives in all of them, and in each."""
    merged = list(merged)
    tensors = [
        {"tensor": item.tensor, "modules": list(item.modules), "dtype": item.dtype, **item.survival.to_dict()}
        for item in merged
    ]
    return {**total(item.survival for item in merged).to_dict(), "tensors": tensors}


class Merger:
    """Runs the jobs of a plan; safe to call from several threads.

    ``recompute``: weights that go back into codes get new scales.
    """

    WORKING_BYTES = Buffers.NBYTES
    #: For each element of a weight that another method than LoRA adapts: base, result, and PEFT's own work.
    TUNED_BYTES = 6 * 4

    def __init__(
        self,
        reader: TensorReader,
        files: Mapping[str, FixedFile | NoFile],
        modules: Sequence[PlacedModule],  # those of all adapters of the plan
        *,
        recompute: bool = False,
    ) -> None:
        self._reader, self._files, self._recompute = reader, files, recompute
        self._factors, self._tuned = FactorLoader(reader), TunedWeights(modules, reader)
        self._local = threading.local()

    def run(self, job: CopyJob | ConvertJob | MergeJob, feedback: Feedback | None = None) -> MergedTensor | None:
        """Do one job; with ``feedback``, values are rounded with the layer's inputs in view."""
        if isinstance(job, CopyJob):
            descriptor = self._reader.opened(job.source, job.source_offset, job.source_offset + job.nbytes)
            self._files[str(job.target)].copy_from(descriptor, job.source_offset, job.target_offset, job.nbytes)
            return None
        if isinstance(job, ConvertJob):
            self._convert(job)
            return None
        return self._merge(job, feedback)

    def _convert(self, job: ConvertJob) -> None:
        source, target = job.source, job.target
        buffers, dtype = self._buffers(block_elements(source)), TORCH_DTYPES[target.dtype]
        for start, stop in row_ranges(source):
            values = self._reader.read_range(source, start, stop, buffers.raw)
            if source.stored != (source,) and not all_finite(values):
                raise _not_finite(source)
            rounded = buffers.out.view(dtype)[: stop - start].copy_(values)
            if dtype == torch.float16 and not torch.isfinite(rounded).all():
                raise _overflow(target.name, target.dtype)
            self._files[str(target.file)].write(rounded, target.start + start * dtype.itemsize)

    def _merge(self, job: MergeJob, feedback: Feedback | None) -> MergedTensor:
        source, target = job.source, job.target
        dtype = torch.float32 if job.codes else TORCH_DTYPES[target.dtype]
        matrices, height, width = job.grid
        if feedback is not None and ((not job.codes and dtype.itemsize > 2) or not feedback.covers(job)):
            feedback = None
        elements = height * width if job.codes else BLOCK_ELEMENTS if feedback is None else feedback.elements(job)
        buffers, stored = self._buffers(elements, width), TORCH_DTYPES[self._reader.dtype_of(source)]
        bias = bias_update(job, self._factors, self._tuned, self._reader)
        base: dict[tuple, Fingerprint] = {}
        survival, saturated, file = Survival(), 0, self._files[str(target.file)]
        for index in range(matrices):
            updates = [self._update(item, buffers) for item in job.updates if item.piece.index == index]
            known_norm = updates[0].known_norm if len(updates) == 1 and not job.rows and bias is None else None
            gauge = Gauge(height * width, known_norm)
            for start, stop in row_blocks(height, width, elements):
                first = index * height + start
                block = buffers.block(stop - start, width, stored, dtype)
                self._reader.read_block(source, first, block.raw, block.raw_bytes)
                raw, rounded, rows = block.raw, block.out, block.rows.copy_(block.raw)
                for update in updates:
                    update.apply(rows, raw, start, stop, buffers)
                for item in job.rows:
                    self._replace_rows(item, rows, start, stop)
                if bias is not None:
                    rows += bias[start:stop, None]
                if job.codes:
                    saturated += self._write_codes(job, index, rows, rounded, feedback)
                elif feedback is None:
                    rounded.copy_(rows)
                else:
                    feedback.round(job, index, start, rows, rounded)
                if not all_finite(rounded):
                    raise self._not_finite(job)
                gauge.add(block.samples)
                if not job.codes:
                    file.write_bytes(block.out_bytes, target.start + first * width * dtype.itemsize)
            survival += gauge.result
            for update in updates:
                base[update.identity] = base.get(update.identity, Fingerprint()) + update.base
        paths = dict.fromkeys(item.placed.module.path for item in job.updates)
        label = source.encoding.label if isinstance(source, EncodedTensor) and job.codes else target.dtype
        return MergedTensor(job.name, tuple(paths), label, survival, base, saturated)

    def _write_codes(
        self, job: MergeJob, index: int, rows: torch.Tensor, out: torch.Tensor, feedback: Feedback | None
    ) -> int:
        """Write one matrix in codes, and what those stand for into ``out``; how many values they cannot reach."""
        encoded = encode(job, index, rows, self._reader, feedback, recompute=self._recompute)
        places = {place.name: place for place in job.codes}
        for ref, first, data in encoded.parts:
            place = places[ref.name]
            self._files[str(place.file)].write(data.contiguous(), place.start + first)
        out.copy_(encoded.values)
        return encoded.saturated

    def _update(self, item: LowRankUpdate, buffers: Buffers) -> Update | WholeUpdate:
        """An update, ready to be applied."""
        if item.placed.module.method is None:
            return self._prepare(item, buffers)
        weight, _ = self._tuned.read_and_merge(item.placed)
        return WholeUpdate(item.piece, item.placed.identity, weight[item.piece.start : item.piece.stop], item.weight)

    def _prepare(self, item: LowRankUpdate, buffers: Buffers) -> Update:
        """Load an update's factors, bring in its gains, and cut out the rows that this tensor holds."""
        placed, piece, scalars = item.placed, item.piece, item.placed.scalars
        increment, magnitude = self._factors.increment(placed)
        rescaling = placed.module.rescaling
        base_gain, update_gain = 1.0, placed.scaling
        if magnitude is not None:
            increment, update_gain = increment.scaled(placed.scaling), 1.0
        if scalars is not None:
            base_gain, update_gain = scalars.base_gain, scalars.update_gain
            if scalars.direction == "low-rank":
                assert isinstance(increment, ProductIncrement)  # a MAP adapter has factors
                _check_direction(item, scalars.direction_norm, product_norm(increment.B, increment.A))
        if item.weight != 1.0:
            base_gain, update_gain = 1.0 + item.weight * (base_gain - 1.0), item.weight * update_gain
        columns = None
        if magnitude is not None and rescaling.axis == "in":
            squares = self._column_squares(placed.weight, None if rescaling.norm == "base" else increment)
            columns, magnitude = column_scales(magnitude, squares), None
        part = slice(piece.start, piece.stop)
        magnitude = None if magnitude is None else magnitude[part]
        update = Update(
            placed.weight,
            piece,
            placed.identity,
            increment.part(piece.start, piece.stop),
            base_gain,
            update_gain,
            magnitude,
            measures_base=scalars is not None,
            of_base=rescaling.norm == "base",
            column_scales=columns,
        )
        if piece.transposed and magnitude is not None:
            update.scales = row_scales(magnitude, self._merged_column_norms(update, buffers))
        return update

    def _column_squares(self, weight: WeightView, increment: Increment | None) -> torch.Tensor:
        """‖W0 + Δ‖² of each column, or of W0 alone: a pass of its own over the weight."""
        squares = torch.zeros(weight.shape[1], dtype=torch.float64)
        for piece, start, stop, values in stored_blocks(weight, self._reader):
            if piece.transposed:
                block = values.float()
                if increment is not None:
                    block = block + increment.part(piece.start, piece.stop).columns(start, stop).T
                squares[start:stop] += block.double().square_().sum(1)
                continue
            block = values.float()
            if increment is not None:
                block = increment.part(piece.start + start, piece.start + stop).added_to(block)
            squares += block.double().square_().sum(0)
        return squares

    def _merged_column_norms(self, update: Update, buffers: Buffers) -> torch.Tensor:
        """Norms of each row of a weight that is stored transposed: a pass of its own, since rows are columns."""
        piece = update.piece
        _, height, width = piece.grid
        squares = torch.zeros(piece.stop - piece.start, dtype=torch.float64)
        for start, stop in row_blocks(height, width):
            raw = read_rows(self._reader, piece, start, stop, buffers.raw)
            merged = raw[:, update.columns].float()
            if not update.of_base:
                merged += update.increment.columns(start, stop).T
            squares += merged.double().square_().sum(0)
        return squares.sqrt_()

    def _not_finite(self, job: MergeJob) -> MapconvError:
        """Whether the base held NaN or infinity, or the merged values do not fit in the output's dtype."""
        buffer = torch.empty(8 * block_elements(job.source), dtype=torch.uint8)
        for start, stop in row_ranges(job.source):
            if not torch.isfinite(self._reader.read_range(job.source, start, stop, buffer)).all():
                return _not_finite(job.source)
        return _overflow(job.target.name, job.target.dtype)

    def _replace_rows(self, item, rows: torch.Tensor, start: int, stop: int) -> None:
        inside = [(i, row - start) for i, row in enumerate(item.rows) if start <= row < stop]
        if inside:
            values = self._reader.read(item.tensor).float()
            sources, targets = zip(*inside, strict=True)
            rows[list(targets)] = values[list(sources)]

    def _buffers(self, elements: int, width: int = 1) -> Buffers:
        if not hasattr(self._local, "buffers"):
            self._local.buffers = Buffers()
        self._local.buffers.fit(elements, width)
        return self._local.buffers


def _check_direction(item: LowRankUpdate, expected: float, norm: float) -> None:
    if abs(norm - expected) > DIRECTION_TOLERANCE * max(norm, expected):
        raise AdapterError(
            f"{item.placed.module.lora_A.file}: the direction of {item.placed.module.path} has norm {norm:.7g}, but "
            f"map_config.json says {expected:.7g}: the two files do not belong together."
        )


def _not_finite(ref: TensorRef) -> CheckpointError:
    return CheckpointError(f"{ref.file}: tensor {ref.name} holds NaN or infinity.")


def _overflow(name: str, dtype: str) -> OutputError:
    return OutputError(
        f"tensor {name} does not fit in {dtype}: some of its values overflow, so choose another --dtype."
    )
