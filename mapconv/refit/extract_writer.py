"""Write what was extracted from a finetune as a MAP directory, module by module."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from mapconv.adapter import MapModule
from mapconv.algebra.moments import InputRoot
from mapconv.checkpoint.index import Checkpoint
from mapconv.metadata.provenance import finetune_record
from mapconv.placement.adapters import FLOAT_DTYPES, PlacedAdapter
from mapconv.placement.finetunes import Finetune, MatrixPair
from mapconv.placement.running import load_target
from mapconv.placement.target_model import TargetModel, plain_target
from mapconv.placement.weights import PlacedModule, in_stacks
from mapconv.refit.activations import roots_of
from mapconv.refit.directory import MapDirectory
from mapconv.refit.extraction import Extracted, ExtractOptions, Extractor
from mapconv.refit.writer import Sample
from mapconv.runtime.progress import progress_bar
from mapconv.runtime.threads import in_order, worker_count

log = logging.getLogger(__name__)

#: Bytes that all workers together may take: both models' weights are held, beside what libraries take on their own.
MEMORY = 128 << 20

_DTYPES = {stored: name for name, stored in FLOAT_DTYPES.items()}


def finetuned_target(checkpoint: Checkpoint, found: Finetune) -> TargetModel:
    """The finetuned model by itself, to be run."""
    return replace(plain_target(checkpoint), class_name=found.class_name)


def known_inputs(
    placed: PlacedAdapter,
    found: Finetune,
    checkpoint: Checkpoint,
    sample: Sample | None,
    options: ExtractOptions,
    *,
    quiet: bool,
) -> Iterator[tuple[Sequence[PlacedModule], Mapping[str, InputRoot | None]]]:
    """Modules in groups, with what is known of the inputs that the finetune gives them."""
    if sample is None or options.statistics is None:
        yield placed.modules, {}
        return
    dtype = _DTYPES.get(found.matrices[0].tuned.dtype, "float32")
    target = finetuned_target(checkpoint, found)
    model = load_target(target, dtype=dtype, device=options.device, quiet=quiet)
    yield from roots_of(model, checkpoint.folder, placed.modules, sample.sequences, options.statistics, options.device)


def write_extraction(
    extractor: Extractor,
    options: ExtractOptions,
    placed: PlacedAdapter,
    matrices: Sequence[MatrixPair],
    groups: Iterator[tuple[Sequence[PlacedModule], Mapping[str, InputRoot | None]]],
    sample: Sample | None,
    staging: Path,
    record: dict[str, Any],
    *,
    quiet: bool,
) -> tuple[tuple[MapModule, Extracted], ...]:
    """Refit every matrix into ``staging``; returns the modules in the order of ``placed``."""
    # The class's own spelling of a path is what a module goes by from here on.
    pairs = dict(zip((item.key for item in placed.modules), matrices, strict=True))
    workers = worker_count(max(extractor.work(pair) for pair in matrices), MEMORY)
    results: dict[Any, Extracted] = {}
    sources: list[dict[str, Any]] = []
    directory = MapDirectory(placed, staging, sources=sources)
    total = sum(pair.base.nbytes for pair in matrices)
    try:
        with progress_bar(total, "extracting", quiet=quiet) as advance:
            for modules, roots in groups:

                def run(
                    stack: Sequence[PlacedModule], roots: Mapping[str, InputRoot | None] = roots
                ) -> list[Extracted]:
                    with torch.inference_mode():
                        return extractor.extract_all(
                            [(item, pairs[item.key], roots.get(item.module.path)) for item in stack]
                        )

                stacks = list(in_stacks(modules, lambda item: item.experts))
                for stack, made in zip(stacks, in_order(run, stacks, workers), strict=True):
                    for item, result in zip(stack, made, strict=True):
                        directory.add(item, result.converted)
                        results[item.key] = result.without_factors()
                        advance(item.weight.nbytes)
                        log.info("%s: ε %.3g, rounding %.3g", item.module.path, *result.told())
        ordered = [results[item.key] for item in placed.modules]
        sources.append(
            finetune_record(placed.adapter.path, [(item.key, results[item.key].tuned) for item in placed.modules])
        )
        record["modules"] = [
            {"path": path, "change": item.change, "floor": item.floor} | ({} if expert is None else {"expert": expert})
            for (path, expert), item in zip((item.key for item in placed.modules), ordered, strict=True)
        ]
        asked = asdict(options) | {"device": str(options.device)}
        scalars = directory.finish(asked, None if sample is None else sample.record, extract=record)
    finally:
        directory.close()
    return tuple(zip(scalars, ordered, strict=True))
