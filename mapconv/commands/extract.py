"""Make an adapter of a full finetune: compare it with its base, refit what differs, carry the rest, write it whole."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from mapconv.adapter import Direction, MapModule
from mapconv.algebra.moments import Statistics
from mapconv.checkpoint.reader import TensorReader
from mapconv.checkpoint.staging import check_output, staged_folder
from mapconv.checkpoint.unchanged import unchanged
from mapconv.commands.extract_checks import refuse_swapped, require_lineage, selected
from mapconv.commands.outputs import output_beside
from mapconv.formats.mapdir import needs_magnitude
from mapconv.hub.locate import open_base, open_model
from mapconv.hub.ranges import prefetch
from mapconv.options.shared import MAX_RANK, SAMPLES, SEQUENCE_LENGTH, STATISTICS
from mapconv.options.surgery import EXTRACT, EXTRACT_RANK
from mapconv.placement.adapters import place_described
from mapconv.placement.bases import plain_base
from mapconv.placement.described import as_adapter
from mapconv.placement.finetunes import MatrixPair, pair_finetune
from mapconv.placement.selection import module_rule
from mapconv.refit.directory import measured
from mapconv.refit.extract_writer import finetuned_target, known_inputs, write_extraction
from mapconv.refit.extraction import ExtractOptions, Extractor, find_changes
from mapconv.refit.plan import Dtype
from mapconv.refit.writer import read_data
from mapconv.runtime.devices import resolve_device

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExtractedModule:
    """A module of the result. ``change`` is ‖T − W0‖/‖W0‖; ``floor`` is the part of ε that no rank can remove, because
    it is the rounding of the finetune's own dtype."""

    scalars: MapModule
    change: float
    floor: float

    def to_dict(self) -> dict[str, Any]:
        return self.scalars.to_dict() | {"change": self.change, "floor": self.floor}


@dataclass(frozen=True)
class ExtractResult:
    """What an extraction wrote, or with ``dry_run`` what it would write (then without modules).

    ``refitted`` modules, ``carried`` whole tensors and their bytes, tensors that are ``unchanged``, and those that
    ``left`` differ but were not asked for. ``cosine`` is that of both models' matrices.
    """

    out: Path
    finetuned: Path
    base: Path
    modules: tuple[ExtractedModule, ...]
    refitted: int
    carried: int
    carried_bytes: int
    unchanged: int
    left: int
    cosine: float
    parameters: int
    nbytes: int
    seconds: float
    dry_run: bool
    plain_lora: bool
    notes: tuple[str, ...] = ()

    @property
    def method(self) -> str:
        return "full finetune"

    @property
    def scalars(self) -> tuple[MapModule, ...]:
        return tuple(module.scalars for module in self.modules)

    @property
    def worst_error(self) -> float:
        return max((module.scalars.error or 0.0 for module in self.modules), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        table = {field.name: getattr(self, field.name) for field in fields(self)}
        table |= {name: str(getattr(self, name)) for name in ("out", "finetuned", "base")}
        table["modules"] = [module.to_dict() for module in self.modules]
        return table | {"worst_error": self.worst_error}


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
    out = output_beside(finetuned, "map") if out is None else Path(out)
    tuned_checkpoint, tuned_config = plain_base(open_model(finetuned, lean=data is None))
    base_checkpoint, base_config = plain_base(open_base(base, None, None, tuned_checkpoint.folder, lean=True))
    if not force:
        refuse_swapped(tuned_checkpoint.folder, base_checkpoint.folder)
    is_target = None if targets is None else module_rule(targets, "--targets")
    found = pair_finetune(base_checkpoint, base_config, tuned_checkpoint, tuned_config, is_target)
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
    inputs = [tuned_checkpoint.folder, base_checkpoint.folder]
    check_output(out, force=force, inputs=inputs)
    with TensorReader(base_checkpoint.source) as one, TensorReader(tuned_checkpoint.source) as two:
        readers = one, two
        for checkpoint in (base_checkpoint, tuned_checkpoint):
            prefetch(checkpoint.source, checkpoint.tensors.values(), quiet=quiet)
        with torch.inference_mode():
            changes = find_changes(found, readers)
        require_lineage(found, changes, force=force)
        matrices, wholes, left, notes = selected(found, changes, targets, exclude)
        placed = place_described(as_adapter(found, matrices, wholes), base_checkpoint, base_config)
        carried = sum(pair.tuned.nbytes for pair in wholes)
        nbytes = carried + sum(_factor_bytes(pair, options) for pair in matrices)
        check_output(out, force=force, inputs=inputs, nbytes=nbytes)
        modules: tuple[ExtractedModule, ...] = ()
        parameters = 0
        if not dry_run:
            sample = None
            if data is not None:
                target = finetuned_target(tuned_checkpoint, found)
                sample = read_data(
                    Path(data),
                    target,
                    samples=samples or SAMPLES.fallback,
                    length=sequence_length or SEQUENCE_LENGTH.fallback,
                )
            signatures = base_checkpoint.signatures | tuned_checkpoint.signatures
            with staged_folder(out, force=force) as staging, unchanged(signatures):
                extractor = Extractor(readers, options)
                jobs = known_inputs(placed, found, tuned_checkpoint, sample, options, quiet=quiet)
                record = {"unchanged": changes.unchanged, "left": left, "cosine": changes.cosine}
                written = write_extraction(
                    extractor, options, placed, matrices, jobs, sample, staging, record, quiet=quiet
                )
                modules = tuple(ExtractedModule(one, item.change, item.floor) for one, item in written)
                parameters, nbytes = measured(staging, [module.scalars for module in modules])
    return ExtractResult(
        out=out,
        finetuned=tuned_checkpoint.folder,
        base=base_checkpoint.folder,
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
        plain_lora=not needs_magnitude([module.scalars for module in modules]),
        notes=(*found.notes, *notes, *placed.target.notes),
    )


def _factor_bytes(pair: MatrixPair, options: ExtractOptions) -> int:
    return sum(pair.base.shape) * min(options.rank, *pair.base.shape) * options.stored_dtype(pair).itemsize
