"""From placed adapters to jobs: all that can be known from names, shapes and headers, before any work.

Jobs hold paths and byte ranges, never tensors; they are what ``--dry-run`` prints and what the workers run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mapconv.adapter import TensorRef, WholeTensor
from mapconv.checkpoint.codecs.encode import rewritten
from mapconv.checkpoint.gguf.header import is_gguf
from mapconv.checkpoint.headers import TensorFile
from mapconv.checkpoint.index import Checkpoint
from mapconv.checkpoint.writer import COPY_CHUNK, TensorSpec, lay_out
from mapconv.errors import UnsupportedError
from mapconv.placement.adapters import FLOAT_DTYPES, PlacedAdapter
from mapconv.placement.target_model import BiasUpdate, MergedBias, TargetModel
from mapconv.placement.weights import Piece, PlacedModule, grid

#: Bytes of tensors in one file of a model that comes from GGUF.
GGUF_SHARD = 5_000_000_000


@dataclass(frozen=True)
class CopyJob:
    """Bytes that stay as they are: one or more neighbouring tensors, or a part of a large one."""

    source: Path
    source_offset: int
    target: Path
    target_offset: int
    nbytes: int

    @property
    def output(self) -> Path:
        return self.target


@dataclass(frozen=True)
class TensorJob:
    """One tensor from where it is stored to its place in the merged model."""

    source: TensorRef
    target: TensorRef

    @property
    def output(self) -> Path:
        return self.target.file

    @property
    def nbytes(self) -> int:
        return self.source.nbytes


@dataclass(frozen=True)
class ConvertJob(TensorJob):
    """A tensor that no adapter touches, written in another dtype, or plain where it is stored in codes."""


@dataclass(frozen=True)
class LowRankUpdate:
    """What one adapted weight does to the part of it that a stored tensor holds, times ``weight``."""

    placed: PlacedModule
    piece: Piece
    weight: float


@dataclass(frozen=True)
class MergeJob(TensorJob):
    """A tensor that the adapters change.

    One that goes back into codes has the places of all that is written for it in ``codes``, ``target`` being the first.
    """

    updates: tuple[LowRankUpdate, ...] = ()
    rows: tuple[WholeTensor, ...] = ()
    biases: tuple[BiasUpdate | MergedBias, ...] = ()
    codes: tuple[TensorRef, ...] = ()

    @property
    def name(self) -> str:
        """The tensor's name, which is not that of its codes."""
        return self.source.name if self.codes else self.target.name

    @property
    def tuned_elements(self) -> int:
        """Elements of the largest weight that it takes whole, because another method than LoRA adapts it; mostly 0."""
        placed = [item.placed for item in self.updates]
        placed += [item.placed for item in self.biases if isinstance(item, MergedBias)]
        return max((item.weight.numel for item in placed if item.module.method is not None), default=0)

    @property
    def grid(self) -> tuple[int, int, int]:
        """The tensor as (matrices, rows, columns)."""
        return grid(self.source.shape, stacked=any(update.piece.stacked for update in self.updates))


Job = CopyJob | ConvertJob | MergeJob


@dataclass(frozen=True)
class OutputFile:
    """A safetensors file to be written: its name, its header, and its size in all."""

    name: str
    header: bytes
    nbytes: int
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class MergePlan:
    """Everything that a merge is going to write. Target paths are relative to the output folder.

    ``modules`` are those of all adapters, in the model's order.
    """

    target: TargetModel
    files: tuple[OutputFile, ...]
    jobs: tuple[Job, ...]
    modules: tuple[PlacedModule, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)


def plan_merge(
    adapters: Sequence[PlacedAdapter],
    *,
    weights: Sequence[float] | None = None,
    dtype: str = "auto",
    max_shard_size: int | None = None,
) -> MergePlan:
    """Lay out the merged checkpoint.

    Args:
        adapters: adapters placed on one target model.
        weights: a factor for each adapter's update; None: 1 for each.
        dtype: ``auto`` keeps each tensor's own; otherwise every floating-point tensor is written in this dtype.
        max_shard_size: bytes of tensors in one file; None keeps the base's files as they are (of a GGUF file, whose
            weights grow, ``GGUF_SHARD``).
    """
    target = adapters[0].target
    if max_shard_size is None and is_gguf(target.folder):
        max_shard_size = GGUF_SHARD
    updates: dict[str, list[LowRankUpdate]] = defaultdict(list)
    for adapter, weight in zip(adapters, weights or [1.0] * len(adapters), strict=True):
        _refuse_weight(adapter, weight)
        for item in adapter.modules:
            for piece in item.weight.pieces:
                updates[piece.tensor.name].append(LowRankUpdate(item, piece, weight))
    output_dtype = partial(_output_dtype, target, dtype)
    #: What a weight's codes bring with them, each by its own name.
    owned = {ref.name: weight for weight in target.encoded.values() for ref in rewritten(weight.encoding)}
    outputs: dict[str, TensorRef] = {}
    files: list[OutputFile] = []
    jobs: list[Job] = []
    for name, prefix, refs, metadata in _files(target, output_dtype, max_shard_size):
        # A model of a pipeline has its own names in its own files.
        specs = [TensorSpec(ref.name.removeprefix(prefix), output_dtype(ref), ref.shape) for ref in refs]
        header, placed = lay_out(Path(name), specs, metadata)
        files.append(OutputFile(name, header, placed[-1].stop, tuple(spec.name for spec in specs)))
        for source, output in zip(refs, placed, strict=True):
            if source.name in owned:
                outputs[source.name] = output
                continue
            low_rank = tuple(updates.get(source.name, ()))
            rows, biases = target.rows.get(source.name, ()), target.biases.get(source.name, ())
            if low_rank or rows or biases:
                jobs.append(MergeJob(source, output, low_rank, rows, biases))
            elif source.dtype != output.dtype or source.stored != (source,):
                jobs.append(ConvertJob(source, output))
            else:
                _append_copy(jobs, source, output)
    for name, weight in target.encoded.items():
        places = tuple(outputs[ref.name] for ref in rewritten(weight.encoding))
        jobs.append(MergeJob(weight, places[0], tuple(updates[name]), target.rows.get(name, ()), codes=places))
    modules = tuple(item for adapter in adapters for item in adapter.modules)
    return MergePlan(target, tuple(files), tuple(_split_copies(jobs)), modules)


def _refuse_weight(adapter: PlacedAdapter, weight: float) -> None:
    """A weight scales updates; what an adapter replaces as a whole (heads, rows, biases) has no part to scale."""
    whole = [item.tensor for item in adapter.adapter.whole]
    whole += [item.module.bias for item in adapter.modules if item.module.bias is not None]
    whole += [item.bias for item in adapter.modules if item.bias is not None and item.changes_bias]
    whole += [item.tensor for item in adapter.adapter.additions]
    if weight != 1.0 and whole:
        raise UnsupportedError(
            f"{adapter.adapter.path} changes {whole[0].name}, which is not an update of a weight and cannot be scaled "
            f"by --weights ({weight:g}): give this adapter the weight 1."
        )


def _files(
    target: TargetModel, output_dtype: Callable[[TensorRef], str], max_shard_size: int | None
) -> Iterable[tuple[str, str, list[TensorRef], dict[str, str]]]:
    """(name below the output folder, the model's prefix, tensors, metadata) of each output file."""
    for prefix, model in target.checkpoint.parts:
        held = {file.path for file in model.files}
        files = [file for file in target.files if file.path in held and file.tensors]
        folder = f"{model.folder.name}/" if target.checkpoint.models else ""
        for name, refs, metadata in _shards(model, files, output_dtype, max_shard_size):
            yield folder + name, prefix, refs, metadata


def _shards(
    model: Checkpoint, files: Sequence[TensorFile], output_dtype: Callable[[TensorRef], str], max_shard_size: int | None
) -> Iterable[tuple[str, list[TensorRef], dict[str, str]]]:
    """(file name, tensors, metadata) of each output file of one model."""
    if max_shard_size is None or model.is_file:
        for file in files:
            yield file.path.name, list(file.tensors), file.metadata
        return
    shards: list[list[TensorRef]] = [[]]
    size = 0
    for ref in (ref for file in files for ref in file.tensors):
        nbytes = TensorSpec(ref.name, output_dtype(ref), ref.shape).nbytes
        if shards[-1] and size + nbytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(ref)
        size += nbytes
    for number, refs in enumerate(shards, 1):
        numbered = f"{model.stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        yield numbered if len(shards) > 1 else model.single_file, refs, files[0].metadata


def _output_dtype(target: TargetModel, dtype: str, ref: TensorRef) -> str:
    own = target.dtypes.get(ref.name, ref.dtype)
    return own if dtype == "auto" or own not in FLOAT_DTYPES.values() else FLOAT_DTYPES[dtype]


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


def _split_copies(jobs: Sequence[Job]) -> Iterable[Job]:
    """Cut long copies, so that several workers share them and a progress bar moves."""
    for job in jobs:
        if not isinstance(job, CopyJob):
            yield job
            continue
        for done in range(0, job.nbytes, COPY_CHUNK):
            size = min(COPY_CHUNK, job.nbytes - done)
            yield CopyJob(job.source, job.source_offset + done, job.target, job.target_offset + done, size)
