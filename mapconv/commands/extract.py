"""Make an adapter of a full finetune: compare it with its base, refit what differs, carry the rest, write it whole."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mapconv.adapter import Direction, MapModule
from mapconv.algebra.moments import Statistics
from mapconv.checkpoint.reader import TensorReader
from mapconv.commands.extract_checks import refuse_swapped, require_lineage, selected
from mapconv.commands.refitting import Refitting, Result, data_notes, missed_tolerance
from mapconv.formats.mapdir import needs_magnitude
from mapconv.hub.locate import open_base, open_model
from mapconv.hub.ranges import prefetch
from mapconv.options.shared import MAX_RANK, SAMPLES, SEQUENCE_LENGTH, STATISTICS
from mapconv.options.surgery import EXTRACT, EXTRACT_RANK
from mapconv.placement.adapters import place_described
from mapconv.placement.bases import plain_base
from mapconv.placement.described import as_adapter
from mapconv.placement.finetunes import MatrixPair
from mapconv.placement.pairing import pair_finetune
from mapconv.placement.selection import module_rule
from mapconv.refit.directory import measured
from mapconv.refit.extract_writer import finetuned_target, known_inputs, write_extraction
from mapconv.refit.extraction import ExtractOptions, Extractor, find_changes
from mapconv.refit.plan import NO_DORA_OF_STACKS, Dtype
from mapconv.refit.writer import read_data
from mapconv.runtime.devices import resolve_device


@dataclass(frozen=True)
class ExtractedModule(MapModule):
    """A module of the result. ``change`` is ‖T − W0‖/‖W0‖; ``floor`` is the share of T − W0 that is rounding of
    the finetune's own dtype: noise of full rank, of which low ranks follow next to nothing."""

    change: float = 0.0
    floor: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ExtractResult(Result):
    """What an extraction wrote.

    ``refitted`` modules, ``carried`` whole tensors and their bytes, tensors that are ``unchanged``, and those that
    ``left`` differ but were not asked for. ``cosine`` is that of both models' matrices.
    """

    finetuned: Path
    modules: tuple[ExtractedModule, ...]
    refitted: int
    carried: int
    carried_bytes: int
    unchanged: int
    left: int
    cosine: float


@EXTRACT.checks
def extract(
    finetuned: str | Path,
    out: str | Path | None = None,
    *,
    base: str | Path,
    targets: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    rank: int | None = None,
    tolerance: float | None = None,
    max_rank: int | None = None,
    direction: Direction = "low-rank",
    lora_compatible: bool = False,
    dtype: Dtype = "float32",
    data: str | Path | None = None,
    samples: int | None = None,
    sequence_length: int | None = None,
    statistics: Statistics | None = None,
    device: str = "auto",
    force: bool = False,
    dry_run: bool = False,
    quiet: bool = True,
) -> ExtractResult:
    """Make a MAP adapter of what a full finetune changed in its base.

    Every weight that differs and that PEFT has a LoRA for is refitted. Norms, biases, heads, and tensors of another
    shape (a grown vocabulary, a new head) are carried as they are, so that merging the result into the base gives the
    finetune back, up to ε in the refitted weights. Unchanged tensors are left out.

    Args:
        finetuned: the finetuned model: a folder, or a Hub reference.
        out: the folder to write; None: ``<finetuned>-map`` beside it, or here for one from the Hub.
        base: the model that it was finetuned from.
        targets: modules to refit, as PEFT's ``target_modules``: ends of names, or a regular expression; None: all but
            heads. Other matrices that differ stay as the base has them.
        exclude: modules to leave as the base has them, named likewise; also those that would be carried whole.
        rank: rank of the result (16).
        tolerance: instead of ``rank``: the smallest rank of each module whose ε is at most this, up to ``max_rank``;
            what is rounding of the finetune's own dtype is set apart, so that no rank is spent on it.
        direction: ``low-rank``: Δ = BA. ``dora``: keep the finetune's row norms, and approximate the rows' directions.
        lora_compatible: keep a = 1, so that the result is a plain LoRA adapter as well.
        dtype: of the stored factors: ``float32``, ``bfloat16``, ``float16``, or ``auto`` for the finetune's own.
        data: text for the finetuned model. Refits then weigh errors by the inputs that its own layers get.
        samples: sequences of ``data`` to run (32), each of ``sequence_length`` tokens (256).
        statistics: of a layer's inputs: ``full`` second moments, or their ``diagonal``, which takes less memory.
        device: ``auto``, ``cpu`` or ``cuda``: where refits run.
        force: replace ``out``, and go on with weights that look like those of another lineage.
        dry_run: compare and plan, write nothing.
        quiet: no progress bar.

    Raises:
        MapconvError: of the kind that fits; ``out`` then does not exist.
        ValueError: an option out of its range, or options that cannot be used together.
    """
    started = time.perf_counter()
    refitting = Refitting.of_model(finetuned, out, "map")
    tuned_checkpoint, tuned_config = plain_base(open_model(finetuned, fetch="ranges" if data is None else "whole"))
    base_checkpoint, base_config = plain_base(open_base(base, None, None, tuned_checkpoint.folder, fetch="ranges"))
    if not force:
        refuse_swapped(tuned_checkpoint.folder, base_checkpoint.folder)
    found = pair_finetune(
        *(base_checkpoint, base_config, tuned_checkpoint, tuned_config),
        None if targets is None else module_rule(targets, "--targets"),
        None if exclude is None else module_rule(exclude, "--exclude"),
        with_stacks=direction == "low-rank",
    )
    options = ExtractOptions(
        rank or EXTRACT_RANK.fallback,
        tolerance,
        max_rank or MAX_RANK.fallback,
        direction,
        lora_compatible,
        dtype,
        resolve_device(device),
        None if data is None else statistics or STATISTICS.fallback,
    )
    models = tuned_checkpoint, base_checkpoint
    refitting.check_output(*models, force=force)
    with TensorReader(base_checkpoint.source) as one, TensorReader(tuned_checkpoint.source) as two:
        readers = one, two
        for checkpoint in models:
            prefetch(checkpoint.source, checkpoint.tensors.values(), quiet=quiet)
        with torch.inference_mode():
            changes = find_changes(found, readers)
        accepted = require_lineage(found, changes, force=force)
        matrices, wholes, left, notes = selected(found, changes, targets, exclude)
        notes += accepted
        if any(pair.stack is not None for pair in matrices) and not lora_compatible:
            options = replace(options, lora_compatible=True)
            notes.append(NO_DORA_OF_STACKS)
        placed = place_described(as_adapter(found, matrices, wholes), base_checkpoint, base_config)
        carried = sum(pair.tuned.nbytes for pair in wholes)
        nbytes = carried + sum(_factor_bytes(pair, options) for pair in matrices)
        refitting.check_output(*models, nbytes=nbytes, force=force)
        modules: tuple[ExtractedModule, ...] = ()
        parameters = 0
        if not dry_run:
            sample = None
            if data is not None:
                target = finetuned_target(tuned_checkpoint, found)
                wanted, length = samples or SAMPLES.fallback, sequence_length or SEQUENCE_LENGTH.fallback
                sample = read_data(Path(data), target, samples=wanted, length=length)
            with refitting.staged(*models, force=force) as staging:
                extractor = Extractor(readers, options)
                jobs = known_inputs(placed, found, tuned_checkpoint, sample, options, quiet=quiet)
                record = {"unchanged": changes.unchanged, "left": left, "cosine": changes.cosine}
                written = write_extraction(
                    extractor, options, placed, matrices, jobs, sample, staging, record, quiet=quiet
                )
                modules = tuple(
                    ExtractedModule(**vars(one), change=item.change, floor=item.floor) for one, item in written
                )
                parameters, nbytes = measured(staging, modules)
                notes += missed_tolerance(modules, tolerance, max_rank or MAX_RANK.fallback)
            if sample is not None:
                notes += data_notes(sample, samples or SAMPLES.fallback, modules)
    return ExtractResult(
        out=refitting.out,
        finetuned=tuned_checkpoint.folder,
        base=base_checkpoint.folder,
        method="full finetune",
        modules=modules,
        refitted=len(matrices),
        carried=len(wholes),
        carried_bytes=carried,
        unchanged=changes.unchanged,
        left=left,
        cosine=changes.cosine,
        parameters=parameters,
        nbytes=nbytes,
        seconds=time.perf_counter() - started,
        dry_run=dry_run,
        plain_lora=not needs_magnitude(modules),
        notes=(*found.notes, *notes, *placed.target.notes),
    )


def _factor_bytes(pair: MatrixPair, options: ExtractOptions) -> int:
    return sum(pair.base.shape) * min(options.rank, *pair.base.shape) * options.stored_dtype(pair).itemsize
