"""Convert a LoRA or DoRA adapter into a MAP directory: plan, convert module by module, write whole or not at all."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mapconv.adapter import Direction, MapModule
from mapconv.algebra.moments import Statistics
from mapconv.commands.refitting import RefitResult, Refitting, data_notes
from mapconv.errors import UnsupportedError
from mapconv.formats.mapdir import needs_magnitude
from mapconv.options.commands import UPGRADE
from mapconv.options.shared import MAX_RANK, SAMPLES, SEQUENCE_LENGTH, STATISTICS
from mapconv.placement.adapters import PlacedAdapter, place_adapter
from mapconv.refit.directory import measured
from mapconv.refit.norms import BaseNorms
from mapconv.refit.plan import ConvertOptions, Dtype, PlanSummary, UpgradePlan, plan_upgrade, row_scales
from mapconv.refit.writer import Sample, read_data, write_map_directory
from mapconv.runtime.devices import resolve_device
from mapconv.spelling import Axis, Norm, Rescaling
from mapconv.wording import counted

if TYPE_CHECKING:
    from mapconv.training.calibration import CalibrationReport


log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class UpgradeResult(RefitResult):
    """What an upgrade wrote; with ``dry_run`` the ``plan`` has a rough estimate of what it takes."""

    plan: PlanSummary

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"plan": self.plan.to_dict()}


@UPGRADE.checks
def upgrade(
    source: str | Path,
    out: str | Path | None = None,
    *,
    base: str | Path | None = None,
    rank: int | None = None,
    tolerance: float | None = None,
    max_rank: int | None = None,
    rank_at_most: int | None = None,
    direction: Direction = "low-rank",
    lora_compatible: bool = False,
    dtype: Dtype = "float32",
    data: str | Path | None = None,
    samples: int | None = None,
    sequence_length: int | None = None,
    statistics: Statistics | None = None,
    calibrate: int = 0,
    device: str = "auto",
    dora_axis: Axis | None = None,
    dora_norm: Norm = "merged",
    allow_pickle: bool = False,
    force: bool = False,
    dry_run: bool = False,
    quiet: bool = True,
) -> UpgradeResult:
    """Convert a LoRA or DoRA adapter to MAP form.

    Args:
        source: the adapter's folder, or a Hub reference (``owner/name[@revision][:subfolder]``).
        out: the MAP directory to write; None: ``<source>-map`` beside the source, or here for one from the Hub.
        base: the base model's folder or Hub id; None takes it from the adapter's configuration.
        rank: rank of the result; None keeps each module's own. A LoRA is resized by its own factors, and stays one.
        tolerance: instead of ``rank``: the smallest rank of each module whose ε is at most this, up to
            ``max_rank`` (256).
        rank_at_most: give every module this rank: cut those above it, and pad those below it with zeros.
        direction: ``low-rank``: Δ = BA, refitted if the source is DoRA. ``dora``: DoRA's own update, exact.
        lora_compatible: keep a = 1, so that the result is a plain LoRA adapter as well.
        dtype: of the stored factors: ``float32``, ``bfloat16``, ``float16``, or ``auto`` for the source's own.
        data: text that the adapter is for. Refits then weigh errors by the layers' inputs on it, which makes the
            outputs closest instead of the weights; ``tolerance`` is then of the outputs as well.
        samples: sequences of ``data`` to run (32), each of ``sequence_length`` tokens (256).
        statistics: of a layer's inputs: ``full`` second moments, or their ``diagonal``, which takes less memory.
        calibrate: steps to train the scalars towards the source on ``data`` afterwards (``mapconv.calibrate`` has
            all its options); 0: none.
        device: ``auto``, ``cpu`` or ``cuda``: where refits and training run.
        dora_axis: of a DoRA whose file does not say so: whether its magnitudes are those of outputs or of inputs.
        dora_norm: what they are divided by: the norm of the ``merged`` weight, or of the ``base``'s.
        allow_pickle: read weights from a ``.bin`` file (with torch's weights-only loader).
        force: replace ``out``.
        dry_run: plan and check, write nothing.
        quiet: no progress bar.

    Raises:
        MapconvError: of the kind that fits; ``out`` then does not exist.
        ValueError: an option out of its range, or options that cannot be used together.
    """
    started = time.perf_counter()
    wanted, length = samples or SAMPLES.fallback, sequence_length or SEQUENCE_LENGTH.fallback
    refitting = Refitting.of([source], out, "map", allow_pickle=allow_pickle)
    source = refitting.source
    options = ConvertOptions(
        rank,
        tolerance,
        max_rank or MAX_RANK.fallback,
        direction,
        lora_compatible,
        dtype,
        device,
        None if data is None else statistics or STATISTICS.fallback,
        rank_at_most,
    )
    # To run the model takes all of it; else a base on the Hub stays there but for what is read.
    fetch, dora = "ranges" if data is None else "whole", Rescaling(dora_axis, dora_norm)
    placed = place_adapter(source, base, allow_pickle=allow_pickle, fetch=fetch, dora=dora)
    if placed.adapter.method == "MAP":
        raise UnsupportedError(f"{source} is a MAP adapter already: upgrade the adapter that it was made from.")
    if not placed.modules:
        raise UnsupportedError(
            f"{source} ({placed.adapter.method}) replaces whole tensors and no more, which MAP has no "
            "form for: merge it."
        )
    methods = [item.module.method for item in placed.modules if row_scales(item) is None]
    method = next((method for method in methods if method is not None), None)
    if method is not None and direction == "dora" and len(methods) == len(placed.modules):
        raise UnsupportedError(
            f"{source} is of the method {method.name}, which has no factors of a DoRA to keep: leave --direction dora "
            "out, to have it refitted."
        )
    plan = plan_upgrade(placed, options)
    log.info("placed %d modules of %s on %s", len(plan.jobs), source, placed.target.folder)
    nbytes = plan.nbytes
    refitting.check_output(placed.target.checkpoint, nbytes=nbytes, force=force)
    sample = None
    if data is not None and not plan.is_exact:
        sample = read_data(Path(data), placed.target, samples=wanted, length=length)
    refitted: tuple[MapModule, ...] = ()
    modules, parameters, calibration = refitted, 0, None
    norms = BaseNorms(placed.target.checkpoint)
    if not dry_run:
        with refitting.staged(placed.target.checkpoint, force=force) as staging:
            refitted = write_map_directory(plan, norms, sample, staging, quiet=quiet)
            modules = refitted
            log.info("wrote %d modules to %s", len(modules), staging)
            if calibrate and sample is not None:
                training = {"steps": calibrate, "sequence_length": length}
                calibration = _calibrate(placed, sample, staging, training, device, allow_pickle, quiet=quiet)
                modules = calibration.modules
            parameters, nbytes = measured(staging, modules)
    notes = [
        *_notes(placed, options),
        *norms.notes,
        *_data_notes(plan, sample, wanted, refitted),
        *(() if calibration is None else calibration.notes),
    ]
    return UpgradeResult(
        out=refitting.out,
        source=source,
        base=placed.target.folder,
        method=placed.adapter.method,
        modules=modules,
        plan=plan.summary(None if sample is None else sample.sequences, estimate=dry_run),
        parameters=parameters,
        nbytes=nbytes,
        seconds=time.perf_counter() - started,
        dry_run=dry_run,
        plain_lora=not needs_magnitude(modules),
        calibration=calibration,
        notes=tuple(dict.fromkeys(notes)),  # a calibration repeats those of its data
    )


def _calibrate(
    placed: PlacedAdapter,
    sample: Sample,
    staging: Path,
    training: dict[str, Any],
    device: str,
    allow_pickle: bool,
    *,
    quiet: bool,
) -> CalibrationReport:
    """Train the staged result in place."""
    # Imported here: a conversion without training must not wait for what trains.
    from mapconv.training.calibration import CalibrationOptions, calibrate_folder
    from mapconv.training.data import read_training_data
    from mapconv.training.processes import Processes

    options, processes = CalibrationOptions(**training), Processes(resolve_device(device))
    data = read_training_data(sample.rows, staging, placed, length=options.sequence_length)
    report = calibrate_folder(
        staging, placed, placed, data, options, processes, into=staging, allow_pickle=allow_pickle, quiet=quiet
    )
    assert report is not None  # this is the only process
    return report


def _notes(placed: PlacedAdapter, options: ConvertOptions) -> list[str]:
    adapter = placed.adapter
    notes = list(adapter.notes)
    columns = [item for item in placed.modules if item.module.method is not None and row_scales(item) is None]
    if options.direction == "dora" and columns:
        at = f"at rank {options.rank_of(columns[0])}{'' if options.rank else ' (--rank or --tolerance chooses)'}"
        at = at if options.tolerance is None else f"to ε ≤ {options.tolerance:g}"
        notes.append(
            f"{adapter.method} scales the inputs of {counted(len(columns), 'module')}, as no DoRA does: refitted "
            f"{at}, with the row norms that they give"
        )
    if adapter.whole:
        notes.append(f"kept as they are: {counted(len(adapter.whole), 'whole tensor')} (heads, biases or token rows)")
    if adapter.method == "LoRA" and options.direction == "dora":
        notes.append("the source is a LoRA adapter, which is exact in low-rank form: --direction dora changes nothing")
    highest = max(item.effective_rank for item in placed.modules)
    if adapter.method == "LoRA" and options.rank is not None and options.rank > highest:
        notes.append(f"the source is a LoRA adapter of rank {highest}: a higher rank would add nothing, so it is kept")
    return notes


def _data_notes(plan: UpgradePlan, sample: Sample | None, wanted: int, refitted: Sequence[MapModule]) -> list[str]:
    """What is wrong with --data, and what it could not serve; a dry run has refitted nothing."""
    if plan.options.statistics is None:
        return []
    if sample is None:
        return ["every module keeps its own factors, which is exact: --data and --calibrate change nothing"]
    solved = {job.placed.key for job in plan.jobs if job.is_solved}
    return data_notes(sample, wanted, [module for module in refitted if (module.path, module.expert) in solved])
