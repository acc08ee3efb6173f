"""Merge an adapter into its base: one pass over the checkpoint, row block by row block, rounded once.

Untouched tensors are copied inside the kernel. A weight that the adapter changes is computed in float32 (norms in
float64) from its own base rows, so memory stays the same for a model of any size.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from mapconv.algebra.dora import merge_rows_
from mapconv.algebra.norms import BLOCK_ELEMENTS, product_norm, row_blocks, squared_norm
from mapconv.checkpoint.index import INDEX_FILE
from mapconv.checkpoint.reader import TORCH_DTYPES, TensorReader
from mapconv.checkpoint.staging import check_output, staged_folder, write_file
from mapconv.checkpoint.writer import FixedFile
from mapconv.errors import AdapterError, BaseMismatchError, CheckpointError, OutputError
from mapconv.factors import Factors, load_factors
from mapconv.hub import locate_adapter
from mapconv.parallel import in_order, worker_count
from mapconv.plan import ConvertJob, CopyJob, MergeJob, MergePlan, PlacedModule, place_adapter, plan_merge
from mapconv.progress import progress_bar
from mapconv.provenance import merge_record
from mapconv.sidecars import MERGE_RECORD, copy_model_files, write_model_config

#: Norms of the same bytes agree far better than this; those of another base do not (DESIGN.md, fingerprint).
NORM_TOLERANCE = 1e-9
#: ‖Δ‖ comes from a Gram matrix of the stored factors, whose rounding its conditioning can enlarge.
DIRECTION_TOLERANCE = 1e-6


@dataclass(frozen=True)
class MergedModule:
    """One weight of the merged model: how far the adapter moved it, and how far the output's dtype moved it again."""

    path: str
    tensor: str
    dtype: str
    base_norm: float
    update_norm: float
    rounding_norm: float

    @property
    def rounding_error(self) -> float:
        """‖W'_written − W'‖ / ‖W' − W0‖: what rounding to the output dtype costs, in units of the update."""
        return self.rounding_norm / self.update_norm if self.update_norm else 0.0


@dataclass(frozen=True)
class MergeResult:
    """What a merge wrote, or with ``dry_run`` what it would write."""

    out: Path
    base: Path
    method: str
    files: tuple[str, ...]
    tensors: int
    nbytes: int
    modules: tuple[MergedModule, ...]
    seconds: float
    dry_run: bool
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        table = asdict(self) | {"out": str(self.out), "base": str(self.base)}
        table["modules"] = [asdict(module) | {"rounding_error": module.rounding_error} for module in self.modules]
        return table


def merge(
    adapter: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    dtype: str = "auto",
    max_shard_size: int | None = None,
    force: bool = False,
    dry_run: bool = False,
    quiet: bool = True,
) -> MergeResult:
    """Merge a MAP directory or a LoRA or DoRA adapter into its base model and write the result to ``out``.

    Args:
        adapter: the adapter's folder, or a Hub reference (``owner/name[@revision][:subfolder]``).
        out: the folder to write; it appears whole or not at all.
        base: the base model's folder or Hub id; None takes it from the adapter's configuration.
        dtype: ``auto`` (each tensor keeps its own), ``float32``, ``bfloat16`` or ``float16``.
        max_shard_size: bytes of tensors in one file; None keeps the base's files.
        force: replace ``out``, and accept a base whose norms differ from those a MAP adapter was made for.
        dry_run: plan and check, write nothing.
        quiet: no progress bar.

    Raises:
        MapconvError: of the kind that fits; ``out`` then does not exist.
    """
    started = time.perf_counter()
    adapter, out = locate_adapter(adapter), Path(out)
    plan = plan_merge(place_adapter(adapter, base), dtype=dtype, max_shard_size=max_shard_size)
    folder = plan.placed.checkpoint.folder
    check_output(out, force=force, inputs=[adapter, folder], nbytes=plan.nbytes)
    modules: list[MergedModule] = []
    notes: list[str] = []
    if not dry_run:
        with staged_folder(out, force=force) as staging:
            modules = _write_weights(plan, staging, accept_other_base=force, quiet=quiet)
            notes += copy_model_files(folder, adapter, staging)
            if len(plan.files) > 1 or plan.placed.checkpoint.index_metadata is not None:
                write_file(staging / INDEX_FILE, _index(plan))
            notes += write_model_config(folder, staging, dtype)
            record = merge_record(plan.placed, plan.placed.adapter.map_modules)
            write_file(staging / MERGE_RECORD, json.dumps(record, indent=2) + "\n")
    return MergeResult(
        out=out,
        base=folder,
        method=plan.placed.adapter.method,
        files=tuple(file.name for file in plan.files),
        tensors=len(plan.placed.checkpoint.tensors),
        nbytes=plan.nbytes,
        modules=tuple(modules),
        seconds=time.perf_counter() - started,
        dry_run=dry_run,
        notes=tuple(notes),
    )


def _write_weights(plan: MergePlan, staging: Path, *, accept_other_base: bool, quiet: bool) -> list[MergedModule]:
    total = sum(job.nbytes for job in plan.jobs)
    with TensorReader() as reader, _output_files(plan, staging) as files:
        merger = _Merger(reader, files, accept_other_base)
        workers = worker_count(_Buffers.NBYTES)
        modules = []
        with progress_bar(total, "merging", quiet=quiet) as advance:
            for job, merged in zip(plan.jobs, in_order(merger.run, plan.jobs, workers), strict=True):
                advance(job.nbytes)
                if merged is not None:
                    modules.append(merged)
    return modules


@contextmanager
def _output_files(plan: MergePlan, staging: Path) -> Iterator[dict[str, FixedFile]]:
    files: dict[str, FixedFile] = {}
    try:
        for file in plan.files:
            files[file.name] = FixedFile(staging / file.name, file.header, file.nbytes)
        yield files
    finally:
        for open_file in files.values():
            open_file.close()


@dataclass
class _Buffers:
    """One worker's scratch memory, reused for every block."""

    NBYTES = BLOCK_ELEMENTS * (4 + 4 + 4 + 8 + 4)

    raw: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    rows: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    spare: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    wide: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))
    out: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))

    def fit(self, elements: int) -> None:
        """Make room for blocks of ``elements`` elements (a row may be wider than a block)."""
        if self.rows.numel() < elements:
            self.raw = torch.empty(4 * elements, dtype=torch.uint8)
            self.rows, self.spare = torch.empty(elements), torch.empty(elements)
            self.wide = torch.empty(elements, dtype=torch.float64)
            self.out = torch.empty(4 * elements, dtype=torch.uint8)

    def widen(self, values: torch.Tensor) -> torch.Tensor:
        return self.wide[: values.numel()].view(values.shape).copy_(values)


class _Merger:
    """Runs jobs; each thread that calls it has its own buffers."""

    def __init__(self, reader: TensorReader, files: Mapping[str, FixedFile], accept_other_base: bool) -> None:
        self._reader, self._files, self._accept_other_base = reader, files, accept_other_base
        self._local = threading.local()

    def run(self, job: CopyJob | ConvertJob | MergeJob) -> MergedModule | None:
        if isinstance(job, CopyJob):
            descriptor = self._reader.descriptor(job.source)
            self._files[job.target.name].copy_from(descriptor, job.source_offset, job.target_offset, job.nbytes)
            return None
        if isinstance(job, ConvertJob):
            self._convert(job)
            return None
        return self._merge(job)

    def _convert(self, job: ConvertJob) -> None:
        source, target = job.source, job.target
        buffers, dtype = self._buffers(BLOCK_ELEMENTS), TORCH_DTYPES[target.dtype]
        for start, stop in row_blocks(source.numel, 1):
            values = self._reader.read_range(source, start, stop, buffers.raw)
            rounded = buffers.out.view(dtype)[: stop - start].copy_(values)
            if dtype == torch.float16 and not torch.isfinite(rounded).all():
                raise _overflow(target.name, target.dtype)
            self._files[target.file.name].write(rounded, target.start + start * dtype.itemsize)

    def _merge(self, job: MergeJob) -> MergedModule:
        placed, target = job.placed, job.target
        base, dtype = placed.base, TORCH_DTYPES[target.dtype]
        factors = load_factors(placed.module, self._reader)
        combine = _combination(placed, factors)
        height, width = base.shape
        buffers = self._buffers(max(width, BLOCK_ELEMENTS))
        base_square = update_square = rounding_square = 0.0
        for start, stop in row_blocks(height, width):
            raw = self._reader.read_rows(base, start, stop, buffers.raw)
            count = raw.numel()
            rows = buffers.rows[:count].view(raw.shape).copy_(raw)
            base_square += squared_norm(raw, buffers.wide)
            combine(rows, start, stop, buffers.widen)
            rounded = buffers.out.view(dtype)[:count].view(raw.shape).copy_(rows)
            self._files[target.file.name].write(rounded, target.start + start * width * dtype.itemsize)
            spare = buffers.spare[:count].view(raw.shape)
            update_square += _square(torch.sub(rows, raw, out=spare))
            rounding_square += _square(torch.sub(rows, rounded, out=spare))
        self._check(placed, base_square**0.5)
        if not math.isfinite(rounding_square):
            raise _overflow(target.name, target.dtype)
        return MergedModule(
            placed.module.path, target.name, target.dtype, base_square**0.5, update_square**0.5, rounding_square**0.5
        )

    def _check(self, placed: PlacedModule, norm: float) -> None:
        """Refuse a base weight that is broken, or another than the one the MAP adapter was made for."""
        if not math.isfinite(norm):
            raise CheckpointError(f"{placed.base.file}: tensor {placed.base.name} holds NaN or infinity.")
        expected = placed.scalars.base_norm if placed.scalars else norm
        if abs(norm - expected) > NORM_TOLERANCE * max(norm, expected) and not self._accept_other_base:
            raise BaseMismatchError(
                f"{placed.base.file}: {placed.base.name} has norm {norm:.9g}, but the MAP adapter was made for a base "
                f"where it is {expected:.9g}: give that base with --base, or accept this one with --force."
            )

    def _buffers(self, elements: int) -> _Buffers:
        if not hasattr(self._local, "buffers"):
            self._local.buffers = _Buffers()
        self._local.buffers.fit(elements)
        return self._local.buffers


def _combination(placed: PlacedModule, factors: Factors):
    """A function that turns rows ``start`` to ``stop`` of W0 into those of W'."""
    scalars, A, B, magnitude = placed.scalars, factors.A, factors.B, factors.magnitude
    base_gain, update_gain = 1.0, placed.module.scaling
    if magnitude is not None:
        B, update_gain = B * placed.module.scaling, 1.0
    if scalars is not None:
        base_gain, update_gain = scalars.base_gain, scalars.update_gain
        if scalars.direction == "low-rank":
            norm = product_norm(B, A)
            if abs(norm - scalars.direction_norm) > DIRECTION_TOLERANCE * max(norm, scalars.direction_norm):
                raise AdapterError(
                    f"{placed.module.lora_A.file}: the direction of {placed.module.path} has norm {norm:.7g}, but "
                    f"map_config.json says {scalars.direction_norm:.7g}: the two files do not belong together."
                )

    def combine(rows: torch.Tensor, start: int, stop: int, widen) -> None:
        part = None if magnitude is None else magnitude[start:stop]
        merge_rows_(
            rows, A, B[start:stop], base_gain=base_gain, update_gain=update_gain, magnitude=part, into_wide=widen
        )

    return combine


def _square(values: torch.Tensor) -> float:
    flat = values.view(-1)
    return float(torch.dot(flat, flat))


def _overflow(name: str, dtype: str) -> OutputError:
    return OutputError(
        f"tensor {name} does not fit in {dtype}: some of its values overflow, so choose another --dtype."
    )


def _index(plan: MergePlan) -> str:
    metadata = dict(plan.placed.checkpoint.index_metadata or {}) | {"total_size": plan.tensor_bytes}
    weight_map = {tensor: file.name for file in plan.files for tensor in file.tensors}
    return json.dumps({"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}, indent=2) + "\n"
