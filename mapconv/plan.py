"""From an adapter and a base to jobs: all that can be known from names, shapes and headers, before any work.

Jobs hold paths and byte ranges, never tensors; they are what ``--dry-run`` prints and what the workers run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mapconv.adapter import Adapter, MapModule, Module, TensorRef
from mapconv.checkpoint.index import Checkpoint
from mapconv.checkpoint.writer import COPY_CHUNK, TensorSpec, lay_out
from mapconv.errors import CheckpointError
from mapconv.formats import read_adapter
from mapconv.hub import open_base
from mapconv.placement import place, require_all_targets

FLOAT_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class PlacedModule:
    """An adapted module, the base tensor it lands on, and its scalars where the adapter is a MAP adapter."""

    module: Module
    base: TensorRef
    scalars: MapModule | None = None


@dataclass(frozen=True)
class PlacedAdapter:
    """An adapter together with the base that it fits."""

    adapter: Adapter
    checkpoint: Checkpoint
    modules: tuple[PlacedModule, ...]


def place_adapter(source: Path, base: str | Path | None, *, lean: bool = False) -> PlacedAdapter:
    """Read the adapter and the base's headers, and place every module.

    With ``lean`` a base on the Hub stays there, but for the bytes that are read (``mapconv.hub.ranges``).

    Raises:
        MapconvError: of the kind that fits; nothing has been computed or written.
    """
    adapter = read_adapter(source)
    checkpoint = open_base(base, adapter.base, adapter.revision, source, lean=lean)
    _refuse_quantized(checkpoint)
    shapes = {name: ref.shape for name, ref in checkpoint.tensors.items()}
    names, renaming = place({module.path: module.weight_shape for module in adapter.modules}, shapes)
    require_all_targets(adapter.config, names, renaming, shapes)
    scalars = adapter.map_modules or (None,) * len(adapter.modules)
    placed = tuple(
        PlacedModule(module, checkpoint.tensors[names[module.path]], own)
        for module, own in zip(adapter.modules, scalars, strict=True)
    )
    for item in placed:
        if item.base.dtype not in FLOAT_DTYPES.values():
            raise CheckpointError(
                f"{item.base.file}: {item.base.name} has dtype {item.base.dtype}: an adapter fits the plain weight, so "
                "give the 16-bit or 32-bit model with --base."
            )
    return PlacedAdapter(adapter, checkpoint, placed)


@dataclass(frozen=True)
class CopyJob:
    """Bytes that stay as they are: one or more neighbouring tensors, or a part of a large one."""

    source: Path
    source_offset: int
    target: Path
    target_offset: int
    nbytes: int


@dataclass(frozen=True)
class ConvertJob:
    """A tensor that no adapter touches, written in another dtype."""

    source: TensorRef
    target: TensorRef

    @property
    def nbytes(self) -> int:
        return self.source.nbytes


@dataclass(frozen=True)
class MergeJob:
    """A tensor that the adapter changes."""

    placed: PlacedModule
    target: TensorRef

    @property
    def nbytes(self) -> int:
        return self.placed.base.nbytes


@dataclass(frozen=True)
class OutputFile:
    """A safetensors file to be written: its name, its header, and its size in all."""

    name: str
    header: bytes
    nbytes: int
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class MergePlan:
    """Everything that a merge is going to write. Target paths are relative to the output folder."""

    placed: PlacedAdapter
    files: tuple[OutputFile, ...]
    jobs: tuple[CopyJob | ConvertJob | MergeJob, ...]

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)

    @property
    def tensor_bytes(self) -> int:
        return self.nbytes - sum(len(file.header) for file in self.files)


def plan_merge(placed: PlacedAdapter, *, dtype: str = "auto", max_shard_size: int | None = None) -> MergePlan:
    """Lay out the merged checkpoint.

    Args:
        placed: the adapter on its base.
        dtype: ``auto`` keeps each tensor's own; otherwise every floating-point tensor is written in this dtype.
        max_shard_size: bytes of tensors in one file; None keeps the base's files as they are.
    """
    by_tensor = {item.base.name: item for item in placed.modules}
    files: list[OutputFile] = []
    jobs: list[CopyJob | ConvertJob | MergeJob] = []
    for name, refs, metadata in _shards(placed.checkpoint, dtype, max_shard_size):
        specs = [TensorSpec(ref.name, _output_dtype(ref, dtype), ref.shape) for ref in refs]
        header, targets = lay_out(Path(name), specs, metadata)
        files.append(OutputFile(name, header, targets[-1].stop, tuple(spec.name for spec in specs)))
        for source, target in zip(refs, targets, strict=True):
            if source.name in by_tensor:
                jobs.append(MergeJob(by_tensor[source.name], target))
            elif source.dtype != target.dtype:
                jobs.append(ConvertJob(source, target))
            else:
                _append_copy(jobs, source, target)
    return MergePlan(placed, tuple(files), tuple(_split_copies(jobs)))


def _shards(
    checkpoint: Checkpoint, dtype: str, max_shard_size: int | None
) -> Iterable[tuple[str, list[TensorRef], dict[str, str]]]:
    """(file name, tensors, metadata) of each output file."""
    if max_shard_size is None:
        for file in checkpoint.files:
            if file.tensors:
                yield file.path.name, list(file.tensors), file.metadata
        return
    shards: list[list[TensorRef]] = [[]]
    size = 0
    for file in checkpoint.files:
        for ref in file.tensors:
            nbytes = TensorSpec(ref.name, _output_dtype(ref, dtype), ref.shape).nbytes
            if shards[-1] and size + nbytes > max_shard_size:
                shards.append([])
                size = 0
            shards[-1].append(ref)
            size += nbytes
    for number, refs in enumerate(shards, 1):
        single = len(shards) == 1
        name = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        yield name, refs, checkpoint.files[0].metadata


def _output_dtype(ref: TensorRef, dtype: str) -> str:
    return ref.dtype if dtype == "auto" or ref.dtype not in FLOAT_DTYPES.values() else FLOAT_DTYPES[dtype]


def _append_copy(jobs: list, source: TensorRef, target: TensorRef) -> None:
    """Add a copy, or lengthen the last one where both sides go on from it."""
    last = jobs[-1] if jobs else None
    if (
        isinstance(last, CopyJob)
        and (last.source, last.target) == (source.file, target.file)
        and last.source_offset + last.nbytes == source.start
        and last.target_offset + last.nbytes == target.start
    ):
        jobs[-1] = CopyJob(
            last.source, last.source_offset, last.target, last.target_offset, last.nbytes + source.nbytes
        )
    else:
        jobs.append(CopyJob(source.file, source.start, target.file, target.start, source.nbytes))


def _split_copies(jobs: Sequence[CopyJob | ConvertJob | MergeJob]) -> Iterable[CopyJob | ConvertJob | MergeJob]:
    """Cut long copies, so that several workers share them and a progress bar moves."""
    for job in jobs:
        if not isinstance(job, CopyJob):
            yield job
            continue
        for done in range(0, job.nbytes, COPY_CHUNK):
            size = min(COPY_CHUNK, job.nbytes - done)
            yield CopyJob(job.source, job.source_offset + done, job.target, job.target_offset + done, size)


def _refuse_quantized(checkpoint: Checkpoint) -> None:
    path = checkpoint.folder / "config.json"
    if not path.exists():
        return
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}): download it again.") from None
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise CheckpointError(
            f"{checkpoint.folder} is quantized ({method}): an adapter fits the plain weight, so give the 16-bit or "
            "32-bit model with --base."
        )
