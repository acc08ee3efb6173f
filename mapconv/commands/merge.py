"""Merge adapters into their base: one pass over the checkpoint, written whole or not at all."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mapconv.checkpoint.reader import TensorReader
from mapconv.checkpoint.sidecars import MERGE_RECORD, copy_model_files, write_model_config
from mapconv.checkpoint.staging import check_output, staged_folder, write_file
from mapconv.checkpoint.writer import FixedFile
from mapconv.errors import BaseMismatchError
from mapconv.hub import locate_adapter
from mapconv.merging.merger import MergedTensor, Merger
from mapconv.merging.plan import MergePlan, plan_merge
from mapconv.metadata.provenance import merge_record
from mapconv.placement.adapters import PlacedAdapter, place_adapters
from mapconv.refit.converter import Dtype
from mapconv.runtime.progress import progress_bar
from mapconv.runtime.threads import in_order, worker_count

#: Norms of the same bytes agree far better than this; those of another base do not (DESIGN.md, fingerprint).
NORM_TOLERANCE = 1e-9


@dataclass(frozen=True)
class MergeResult:
    """What a merge wrote, or with ``dry_run`` what it would write (then without ``merged``)."""

    out: Path
    base: Path
    method: str
    files: tuple[str, ...]
    tensors: int
    nbytes: int
    merged: tuple[MergedTensor, ...]
    seconds: float
    dry_run: bool
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        table = asdict(self) | {"out": str(self.out), "base": str(self.base)}
        table["merged"] = [
            {
                "tensor": item.tensor,
                "modules": item.modules,
                "dtype": item.dtype,
                "update_norm": item.update_norm,
                "rounding_norm": item.rounding_norm,
                "rounding_error": item.rounding_error,
            }
            for item in self.merged
        ]
        return table


def merge(
    adapters: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    base: str | Path | None = None,
    weights: Sequence[float] | None = None,
    dtype: Dtype = "auto",
    max_shard_size: int | None = None,
    allow_pickle: bool = False,
    force: bool = False,
    dry_run: bool = False,
    quiet: bool = True,
) -> MergeResult:
    """Merge a MAP directory or a LoRA or DoRA adapter, or several, into the base model and write it to ``out``.

    Args:
        adapters: the adapter's folder or Hub reference (``owner/name[@revision][:subfolder]``), or several: updates of
            LoRA and MAP adapters on one weight add up.
        out: the folder to write; it appears whole or not at all.
        base: the base model's folder or Hub id; None takes it from the first adapter's configuration.
        weights: a factor for each adapter's update; None: 1 for each.
        dtype: ``auto`` (each tensor keeps its own), ``float32``, ``bfloat16`` or ``float16``.
        max_shard_size: bytes of tensors in one file; None keeps the base's files.
        allow_pickle: read weights from ``.bin`` files (with torch's weights-only loader).
        force: replace ``out``, and accept a base whose norms differ from those a MAP adapter was made for.
        dry_run: plan and check, write nothing.
        quiet: no progress bar.

    Raises:
        MapconvError: of the kind that fits; ``out`` then does not exist.
        ValueError: another number of weights than of adapters.
    """
    started = time.perf_counter()
    named = [adapters] if isinstance(adapters, str | Path) else list(adapters)
    if weights is not None and len(weights) != len(named):
        raise ValueError(f"{len(weights)} weights for {len(named)} adapters")
    sources = [locate_adapter(adapter, allow_pickle=allow_pickle) for adapter in named]
    out = Path(out)
    placed = place_adapters(sources, base, allow_pickle=allow_pickle)
    plan = plan_merge(placed, weights=weights, dtype=dtype, max_shard_size=max_shard_size)
    folder = plan.target.folder
    check_output(out, force=force, inputs=[*sources, folder], nbytes=plan.nbytes)
    merged: tuple[MergedTensor, ...] = ()
    notes = [*(note for item in placed for note in item.adapter.notes), *plan.target.notes]
    if not dry_run:
        with staged_folder(out, force=force) as staging:
            merged = _write_weights(plan, staging, quiet=quiet)
            if not force:
                _check_base(placed, merged)
            notes += copy_model_files(folder, sources[0], staging)
            if len(plan.files) > 1 or plan.target.checkpoint.index_metadata is not None:
                write_file(staging / plan.target.checkpoint.index_file, _index(plan))
            notes += write_model_config(folder, staging, dtype, plan.target.config)
            record = merge_record(placed, weights)
            write_file(staging / MERGE_RECORD, json.dumps(record, indent=2) + "\n")
    return MergeResult(
        out=out,
        base=folder,
        method=" + ".join(item.adapter.method for item in placed),
        files=tuple(file.name for file in plan.files),
        tensors=sum(len(file.tensors) for file in plan.files),
        nbytes=plan.nbytes,
        merged=merged,
        seconds=time.perf_counter() - started,
        dry_run=dry_run,
        notes=tuple(notes),
    )


def _write_weights(plan: MergePlan, staging: Path, *, quiet: bool) -> tuple[MergedTensor, ...]:
    total = sum(job.nbytes for job in plan.jobs)
    with TensorReader() as reader, _output_files(plan, staging) as files:
        merger, merged = Merger(reader, files), []
        with progress_bar(total, "merging", quiet=quiet) as advance:
            results = in_order(merger.run, plan.jobs, worker_count(Merger.WORKING_BYTES))
            for job, result in zip(plan.jobs, results, strict=True):
                advance(job.nbytes)
                if result is not None:
                    merged.append(result)
    return tuple(merged)


def _check_base(placed: Sequence[PlacedAdapter], merged: Sequence[MergedTensor]) -> None:
    """Refuse a base whose weights are not those that a MAP adapter was made for: norms come free with the merge."""
    squares: dict[tuple, float] = defaultdict(float)
    for tensor in merged:
        for identity, square in tensor.base_squares.items():
            squares[identity] += square
    for item in (item for adapter in placed for item in adapter.modules if item.scalars is not None):
        norm, expected = squares[item.identity] ** 0.5, item.scalars.base_norm
        if abs(norm - expected) > NORM_TOLERANCE * max(norm, expected):
            raise BaseMismatchError(
                f"{item.weight.pieces[0].tensor.file}: {item.weight.name} has norm {norm:.9g}, but the MAP adapter was "
                f"made for a base where it is {expected:.9g}: give that base with --base, or accept this one with "
                "--force."
            )


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


def _index(plan: MergePlan) -> str:
    metadata = dict(plan.target.checkpoint.index_metadata or {}) | {"total_size": plan.tensor_bytes}
    weight_map = {tensor: file.name for file in plan.files for tensor in file.tensors}
    return json.dumps({"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}, indent=2) + "\n"
