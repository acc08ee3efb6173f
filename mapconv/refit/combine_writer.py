"""Write what several adapters are together as a MAP directory, weight by weight."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from mapconv.adapter import MapModule
from mapconv.algebra.moments import InputRoot
from mapconv.checkpoint.reader import TensorReader
from mapconv.metadata.provenance import source_record
from mapconv.placement.adapters import PlacedAdapter, place_adapter
from mapconv.placement.union import Shared
from mapconv.placement.weights import in_stacks
from mapconv.refit.activations import input_roots
from mapconv.refit.combination import CombineOptions, Combiner
from mapconv.refit.converted import Converted
from mapconv.refit.directory import MapDirectory
from mapconv.refit.norms import BaseNorms
from mapconv.refit.whole import Wholes
from mapconv.refit.writer import Sample
from mapconv.runtime.progress import progress_bar
from mapconv.runtime.threads import in_order, worker_count

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Combination:
    """Several adapters on one base, and what is asked of them together.

    ``result`` is the adapter that they become, before its factors are known; ``names`` is what the user calls each;
    ``force`` accepts a base that a MAP adapter was not made for.
    """

    result: PlacedAdapter
    placed: Sequence[PlacedAdapter]
    shared: Sequence[Shared]
    wholes: Wholes
    options: CombineOptions
    names: Sequence[str]
    norms: BaseNorms
    force: bool


def write_combination(
    made: Combination, staging: Path, sample: Sample | None, *, label: str = "combining", quiet: bool
) -> tuple[tuple[MapModule, ...], list[str]]:
    """Combine every weight into ``staging``; returns the modules' scalars, and what ``force`` accepted.

    Args:
        made: what is combined.
        staging: an empty folder.
        sample: text to weigh errors by the layers' inputs on; None weighs all weights alike.
        label: what the progress bar says.
        quiet: no progress bar.
    """
    records = [source_record(item.adapter) for item in made.placed]
    options, shared = made.options, made.shared
    directory = MapDirectory(made.result, staging, sources=records)
    # Where one module's gain may differ from 1, stock PEFT takes all modules for DoRAs.
    with_magnitude = Combiner.needs_gains(options, shared) and not (
        options.lora_compatible and options.direction == "low-rank"
    )
    total = sum(item.item.weight.nbytes for item in shared)
    try:
        with TensorReader(made.result.target.checkpoint.source) as reader:
            with torch.inference_mode():
                made.norms.load([item.item.weight for item in shared], reader)
            contents = [record["fingerprint"] for record in records]
            combiner = Combiner(
                reader, made.norms, options, made.names, contents, with_magnitude=with_magnitude, force=made.force
            )
            workers = worker_count(max(combiner.work(item) for item in shared))
            with progress_bar(total, label, quiet=quiet) as advance:
                for weights, roots in _known_inputs(made, sample, quiet=quiet):

                    def run(stack: Sequence[Shared], roots: Mapping[str, InputRoot | None] = roots) -> list[Converted]:
                        with torch.inference_mode():
                            return combiner.combine(stack, roots.get(stack[0].item.module.path))

                    stacks = list(in_stacks(weights, lambda weight: weight.item.experts))
                    for stack, results in zip(stacks, in_order(run, stacks, workers), strict=True):
                        for item, result in zip(stack, results, strict=True):
                            directory.add(item.item, result)
                            advance(item.item.weight.nbytes)
                            log.info("%s: ε %.3g", item.item.module.path, result.scalars.error or 0.0)
            with torch.inference_mode():
                for name, spec, blocks in made.wholes.made(reader, shared, options.weights):
                    directory.carry(name, spec, blocks)
        asked = asdict(options) | {"device": str(options.device), "weights": list(options.weights)}
        modules = directory.finish(asked, None if sample is None else sample.record)
        return modules, combiner.accepted
    finally:
        directory.close()


def _known_inputs(
    made: Combination, sample: Sample | None, *, quiet: bool
) -> Iterator[tuple[Sequence[Shared], Mapping[str, InputRoot | None]]]:
    """Weights in groups, with what is known of the inputs that the combined model gives their layers.

    That model is the base with all that the adapters are together at the sum of their ranks, which stock PEFT runs: a
    sum of LoRAs exactly, another combination up to what that rank leaves out.
    """
    options = made.options
    if sample is None or options.statistics is None:
        yield made.shared, {}
        return
    whole = replace(options, rank=None, tolerance=None, direction="low-rank", dtype="float32", statistics=None)
    with TemporaryDirectory(prefix="mapconv-") as folder:
        write_combination(replace(made, options=whole), Path(folder), None, label="adding up", quiet=quiet)
        placed = place_adapter(Path(folder), made.result.target.folder)
        groups = input_roots(
            placed, sample.sequences, statistics=options.statistics, device=options.device, quiet=quiet
        )
        for modules, roots in groups:
            paths = {item.module.path for item in modules}
            yield [item for item in made.shared if item.item.module.path in paths], roots
