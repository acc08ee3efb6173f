"""Write a MAP directory: every module of a placed adapter converted, block by block, and all that it brings besides."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from mapconv.adapter import MapModule
from mapconv.algebra.moments import InputRoot
from mapconv.checkpoint.model_config import read_model_config
from mapconv.checkpoint.reader import SAFETENSORS_DTYPES, TensorReader
from mapconv.checkpoint.writer import TensorSpec
from mapconv.data import Dataset, Rows, read_dataset, read_rows
from mapconv.formats.mapdir import (
    factor_shapes,
)
from mapconv.hub.ranges import prefetch
from mapconv.placement.target_model import TargetModel
from mapconv.placement.weights import PlacedModule, in_stacks
from mapconv.refit.activations import input_roots
from mapconv.refit.converted import Converted
from mapconv.refit.converter import Converter
from mapconv.refit.directory import MapDirectory
from mapconv.refit.norms import BaseNorms
from mapconv.refit.plan import UpgradePlan
from mapconv.runtime.devices import resolve_device
from mapconv.runtime.models import load_tokenizer, stored_text_classes
from mapconv.runtime.progress import work_bar
from mapconv.runtime.threads import in_order

log = logging.getLogger(__name__)

#: Factors that one job keeps: they are in memory once as they are read and once as they are written.
BATCH_BYTES = 2 << 20


@dataclass(frozen=True)
class Sample:
    """The sequences that refits look at, the data that they are from, and what the result records of them."""

    sequences: Dataset
    rows: Rows
    record: dict[str, Any]


def read_data(path: Path, target: TargetModel, *, samples: int, length: int) -> Sample:
    """The first sequences of the training part: what a calibration holds out of the same file stays unseen."""
    rows = read_rows(path)
    config = target.source_config or read_model_config(target.folder)
    classes = stored_text_classes(target.class_name or "", config)
    train, _ = read_dataset(rows, load_tokenizer(target.tokenizer), length=length, samples=samples, classes=classes)
    record = {"name": path.name, "fingerprint": train.fingerprint, "sequences": len(train), "tokens": train.tokens}
    return Sample(train, rows, record)


def write_map_directory(
    plan: UpgradePlan,
    norms: BaseNorms,
    sample: Sample | None,
    staging: Path,
    *,
    quiet: bool,
) -> tuple[MapModule, ...]:
    """Convert every module into ``staging``; returns their scalars."""
    directory = MapDirectory(plan.placed, staging, _expected(plan))
    try:
        for item, result in converted_modules(plan, norms, sample, quiet=quiet):
            directory.add(item, result)
        return directory.finish(asdict(plan.options), None if sample is None else sample.record)
    finally:
        directory.close()


def converted_modules(
    plan: UpgradePlan, norms: BaseNorms, sample: Sample | None = None, *, label: str = "upgrading", quiet: bool
) -> Iterator[tuple[PlacedModule, Converted]]:
    """Convert every module, in the plan's order; ``label`` is what the progress bar says."""
    placed, tokens = plan.placed, 0 if sample is None else sample.sequences.tokens
    # A module takes its refit and its share of the passes that find its inputs.
    costs = {job.placed.key: job.work + 2 * tokens * job.placed.weight.numel for job in plan.jobs}
    source = placed.target.checkpoint.source
    light, needed = ([item.weight for item in items] for items in (plan.light, plan.reading))
    prefetch(source, [piece.tensor for w in (*needed, *norms.missing(light)) for piece in w.pieces], quiet=quiet)
    with TensorReader(source) as reader, work_bar(costs.values(), label, unit="module", quiet=quiet) as advance:
        norms.load(light, reader)
        converter = Converter(reader, plan, norms)
        for modules, roots in _groups(plan, sample, quiet=quiet):
            jobs = [(batch, roots.get(batch[0].module.path)) for batch in _batches(modules, plan)]
            results = in_order(lambda job: converter.convert_all(*job), jobs, plan.workers)
            pairs = zip(modules, chain.from_iterable(results), strict=True)
            for stack in in_stacks(pairs, lambda pair: pair[0].experts):
                # The factors of a stack are one tensor, of one rank.
                rank = max(len(result.A) for _, result in stack)
                for item, result in stack:
                    yield item, result.with_rank(rank)
                    advance(costs[item.key])
                    log.info("%s: %s, rank %d, ε %.3g", *_told(item, plan, result))


def _told(item: PlacedModule, plan: UpgradePlan, result: Converted) -> tuple[str, str, int, float]:
    expert = "" if item.expert is None else f", expert {item.expert}"
    return f"{item.module.path}{expert}", plan.kind_of(item), result.scalars.rank, result.scalars.error or 0.0


def _batches(modules: Sequence[PlacedModule], plan: UpgradePlan) -> Iterator[list[PlacedModule]]:
    """Jobs worth a thread's while: modules that only keep their factors go together, a refit alone."""
    batch: list[PlacedModule] = []
    nbytes = 0
    for item in modules:
        light = plan.kind_of(item) == "keep-lora" and item.experts == 1
        if batch and (not light or nbytes >= BATCH_BYTES):
            yield batch
            batch, nbytes = [], 0
        if not light:
            yield [item]
            continue
        batch.append(item)
        nbytes += item.module.lora_A.nbytes + item.module.lora_B.nbytes
    if batch:
        yield batch


def _groups(
    plan: UpgradePlan, sample: Sample | None, *, quiet: bool
) -> Iterable[tuple[Sequence[PlacedModule], Mapping[str, InputRoot | None]]]:
    """The modules that are converted together, and what is known of their inputs."""
    placed, options = plan.placed, plan.options
    if sample is None or options.statistics is None:
        return [(placed.modules, {})]
    device = resolve_device(options.device)
    return input_roots(placed, sample.sequences, statistics=options.statistics, device=device, quiet=quiet)


def _expected(plan: UpgradePlan) -> list[TensorSpec]:
    """The tensors of the result in their order, where that is known before any is computed: a LoRA of linear layers."""
    placed, options = plan.placed, plan.options
    simple = all(
        job.kind == "keep-lora" and job.placed.experts == 1 and job.placed.module.bias is None for job in plan.jobs
    )
    if not simple or placed.adapter.others or placed.adapter.additions or options.rank_at_most is not None:
        return []
    specs = []
    for item in placed.modules:
        dtype, (height, _) = SAFETENSORS_DTYPES[options.stored_dtype(item)], item.weight.shape
        names = factor_shapes(item.module, item.effective_rank, height, item.effective_rank)
        specs += [TensorSpec(name, dtype, shape) for name, shape in names]
    return specs
