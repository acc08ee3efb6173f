"""Refit an adapter for another base than it was trained on: plan, refit layer by layer, measure, write whole or not."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mapconv.adapter import MapModule
from mapconv.commands.refitting import RefitResult, Refitting
from mapconv.errors import FidelityError, UnsupportedError
from mapconv.fidelity.served import ServedNumbers, measure_served
from mapconv.formats.mapdir import needs_magnitude
from mapconv.metadata.provenance import base_name, base_revision
from mapconv.options.commands import REBASE
from mapconv.options.shared import MAX_RANK, SAMPLES, SEQUENCE_LENGTH
from mapconv.placement.adapters import PlacedAdapter, place_adapter
from mapconv.placement.all_linear import with_changed_linears
from mapconv.placement.factors import require_factors
from mapconv.placement.pairing import pair_bases
from mapconv.refit.directory import MapDirectory, measured
from mapconv.refit.evidence import Refits, Statistics, gather, planned_text
from mapconv.refit.plan import Dtype
from mapconv.refit.ranks import mean_rank, spread_ranks
from mapconv.refit.rebase import Rebased, RebaseOptions, Rebaser, notes_on_inputs
from mapconv.refit.rebase_plan import RebasePlan, plan_rebase
from mapconv.runtime.devices import resolve_device
from mapconv.runtime.memory import release_freed
from mapconv.runtime.progress import progress_bar

#: Sequences that the source writes by default: of what it writes, twice as many are needed as of text of the task.
WRITTEN = 64


@dataclass(frozen=True, kw_only=True)
class RebaseResult(RefitResult):
    """What a rebase wrote, an adapter of the base ``onto``.

    ``served`` compares the other base alone, the source on it as it is, and the result, with the source on its own
    base, on text that the refit did not see; None where no model was run. ``unchanged`` says that both bases are equal.
    ``plan`` is that of a dry run.
    """

    onto: Path
    statistics: str
    unchanged: bool
    served: ServedNumbers | None = None
    plan: RebasePlan | None = None

    def to_dict(self) -> dict[str, Any]:
        tables = {"served": self.served, "plan": self.plan}
        return super().to_dict() | {name: None if one is None else one.to_dict() for name, one in tables.items()}


@REBASE.checks
def rebase(
    source: str | Path,
    out: str | Path | None = None,
    *,
    onto: str | Path,
    base: str | Path | None = None,
    rank: int | None = None,
    tolerance: float | None = None,
    max_rank: int | None = None,
    all_linear: bool = False,
    spread_rank: bool = False,
    pad_ranks: bool = False,
    free_gain: bool = False,
    dtype: Dtype = "float32",
    data: str | Path | None = None,
    samples: int | None = None,
    sequence_length: int | None = None,
    statistics: Statistics = "source",
    statistics_from: str | Path | None = None,
    calibrate: int = 0,
    seed: int = 0,
    device: str = "auto",
    keep_worse: bool = False,
    allow_pickle: bool = False,
    force: bool = False,
    dry_run: bool = False,
    quiet: bool = True,
) -> RebaseResult:
    """Refit an adapter for the base that it is to be served on.

    Args:
        source: a LoRA, DoRA or MAP adapter: a folder, or a Hub reference.
        out: the folder to write; None: ``<source>-rebased`` beside the source.
        onto: the base that the result is for, a folder or a Hub id: of the same architecture, quantized or not.
        base: the base that the adapter was trained on; None takes it from the adapter's configuration.
        rank: rank of the result; None keeps each module's own.
        tolerance: instead of ``rank``: the smallest rank of each module whose ε is at most this, up to ``max_rank``.
        all_linear: also fit every linear layer that the adapter leaves alone and ``onto`` changed, but for the output
            head; ``rank`` (None: the source's mean) is then shared out as by ``spread_rank``.
        spread_rank: take ``rank`` as the mean over the modules' parameters, and give rank where it brings the layers'
            outputs closest per parameter, by the inputs of the source (or those collected, or by weights alone).
        pad_ranks: pad all factors with zeros to the largest rank, for servers that take one rank.
        free_gain: fit a factor of ``onto``'s weights as well; the result is then a DoRA for stock PEFT, which servers
            of quantized bases do not take.
        dtype: of the stored factors: ``float32``, ``bfloat16``, ``float16``, or ``auto`` for the source's own.
        data: text that the adapter is for; None: the source model writes its own.
        samples: sequences to fit on (32 of ``data``, or 64 that the source writes), each of ``sequence_length`` tokens
            (256).
        statistics: ``source``: fit each layer to the source's own inputs. ``running``: to those that it gets behind
            the layers rebased before it, for which a second model runs; that needs many tokens, and brings little
            (examples/benchmarks/README.md). ``none``: to the weights alone.
        statistics_from: what ``mapconv.statistics`` collected of ``base``: no model runs, and ``data`` only serves to
            measure the result.
        calibrate: steps to train the result afterwards, on ``onto``, towards the source on ``base``, with both bases
            in memory in float32; on ``data`` or the source's own samples. The factors are trained and the base gain is
            not, so that a plain LoRA stays one; with ``free_gain`` it is trained as well. The result is the step that
            is best on held-out text. 0: none.
        seed: of the text that the source model writes, and of the order in which it is trained on.
        device: ``auto``, ``cpu`` or ``cuda``.
        keep_worse: write a result even if it is further from the source than the source itself put on ``onto``.
        allow_pickle: read weights from a ``.bin`` file (with torch's weights-only loader).
        force: replace ``out``.
        dry_run: plan and check, write nothing.
        quiet: no progress bar.

    Raises:
        MapconvError: of the kind that fits; ``out`` then does not exist.
        ValueError: an option out of its range, or options that cannot be used together.
    """
    started = time.perf_counter()
    own = data is None and statistics_from is None
    wanted, length = samples or (WRITTEN if own else SAMPLES.fallback), sequence_length or SEQUENCE_LENGTH.fallback
    refitting = Refitting.of([source], out, "rebased", allow_pickle=allow_pickle)
    source = refitting.source
    runs = (statistics != "none" and statistics_from is None) or data is not None
    trained = place_adapter(source, base, allow_pickle=allow_pickle, fetch="whole" if runs else "ranges")
    served = place_adapter(source, onto, allow_pickle=allow_pickle, fetch="whole" if runs else "ranges")
    if all_linear:
        trained, served = with_changed_linears(trained, served)
    if not trained.modules:
        raise UnsupportedError(
            f"{source} ({trained.adapter.method}) replaces whole tensors and no more, so there is nothing to refit: "
            "put it on --onto as it is, or give --all-linear."
        )
    require_factors(item.module for item in trained.modules)
    pair_bases(trained, served)
    if calibrate:
        # Imported here: a rebase without training must not wait for what trains.
        from mapconv.commands.rebase_training import calibrate_rebased, target_classes

        target_classes(trained.target)  # refuses what cannot be trained
    spread = (all_linear or spread_rank) and tolerance is None
    rank = mean_rank(trained) if spread and rank is None else rank
    options = RebaseOptions(rank, tolerance, max_rank or MAX_RANK.fallback, free_gain, dtype, pad_ranks)
    nbytes, models = options.stored_bytes(served), (trained.target.checkpoint, served.target.checkpoint)
    refitting.check_output(*models, nbytes=nbytes, force=force)
    notes = [*trained.adapter.notes, *served.adapter.notes, *_other_base(trained, base)]
    modules: tuple[MapModule, ...] = ()
    parameters, numbers, changed, calibration, plan = 0, None, True, None, None
    text = None if data is None else Path(data)
    collected = None if statistics_from is None else Path(statistics_from)
    if dry_run:
        looked_at = planned_text(trained, statistics, text, wanted, length, collected)
        run = 0 if collected or statistics == "none" else {"running": 2, "source": 1}[statistics]
        plan = plan_rebase(trained, served, options, looked_at, spread=spread, models=run, steps=calibrate)
    else:
        place = resolve_device(device)
        with refitting.staged(*models, force=force) as staging:
            refits, evidence = gather(
                trained, served, statistics, text, wanted, length, seed, place, collected=collected, quiet=quiet
            )
            directory = MapDirectory(served, staging)
            try:
                if spread:
                    options = _spread(trained, served, options, refits)
                results = _refit(trained, served, options, refits, directory, quiet=quiet)
                del refits  # and with it the models that ran, whose hooks refer to them in circles
                if evidence.text is not None:  # others are going to run
                    release_freed()
                changed = any(item.changed > 0 for item in results)
                record = _record(trained, results)
                # The ranks stand with the modules.
                asked = {key: value for key, value in asdict(options).items() if key != "ranks"}
                asked |= {"all_linear": all_linear, "spread_rank": spread, "statistics": statistics, "seed": seed}
                modules = directory.finish(asked, evidence.record, rebase=record)
            finally:
                directory.close()
            if calibrate and evidence.text is not None:
                training = {"steps": calibrate, "seed": seed, "hold_gain": not free_gain}
                calibration = calibrate_rebased(
                    trained, served, evidence.text, staging, training, place, allow_pickle, quiet=quiet
                )
                modules = calibration.modules
            # A calibration chose its best step by all of them: its numbers are to be those of the table.
            if rows := evidence.held_out(every=bool(calibrate)):
                numbers = measure_served(trained, served, staging, rows, device=place, quiet=quiet)
            if numbers is not None:
                directory.amend(rebase=record | {"served": numbers.to_dict()})
                if numbers.is_worse and not keep_worse:
                    raise FidelityError(_worse(source, numbers) if changed else _nothing(served))
            parameters, nbytes = measured(staging, modules)
            notes += [] if evidence.record is None else notes_on_inputs(results)
            notes += [*evidence.notes, *(() if calibration is None else calibration.notes)]
            if not changed:
                notes.append("both bases hold the same weights: there was nothing to rebase")
    return RebaseResult(
        out=refitting.out,
        source=source,
        base=trained.target.folder,
        onto=served.target.folder,
        method=trained.adapter.method,
        statistics=statistics,
        modules=modules,
        parameters=parameters,
        nbytes=nbytes,
        seconds=time.perf_counter() - started,
        dry_run=dry_run,
        plain_lora=not needs_magnitude(modules),
        unchanged=not changed,
        served=numbers,
        plan=plan,
        calibration=calibration,
        notes=tuple(dict.fromkeys(notes)),
    )


def _spread(trained: PlacedAdapter, served: PlacedAdapter, options: RebaseOptions, refits: Refits) -> RebaseOptions:
    """The options with a rank for each module; the experts of a stack, which must be alike, keep theirs."""
    modules = [item for item in served.modules if item.experts == 1]
    assert options.rank is not None  # the mean, which the caller has settled
    if not modules:
        return options
    with torch.inference_mode(), Rebaser(trained, served, options) as rebaser:
        spectra = list(rebaser.spectra(refits.survey(modules)))
    return replace(options, ranks=spread_ranks(spectra, options.rank))


def _refit(
    trained: PlacedAdapter,
    served: PlacedAdapter,
    options: RebaseOptions,
    refits: Refits,
    directory: MapDirectory,
    *,
    quiet: bool,
) -> list[Rebased]:
    """Refit every module into ``directory``; what is kept of each has no factors."""
    results = []
    total = sum(item.weight.nbytes for item in served.modules)
    with (
        torch.inference_mode(),
        Rebaser(trained, served, options) as rebaser,
        progress_bar(total, "rebasing", quiet=quiet) as advance,
    ):
        for item in refits.run(rebaser, served.modules):
            directory.add(item.placed, item.converted)
            results.append(item.without_factors())
            advance(item.placed.weight.nbytes)
    return results


def _record(trained: PlacedAdapter, results: list[Rebased]) -> dict[str, Any]:
    """Where the adapter came from, and what the layers' outputs lost before and after."""
    return {
        "from": {"name": base_name(trained), "revision": base_revision(trained)},
        "modules": [
            {
                "path": item.placed.module.path,
                "expert": item.placed.expert,
                "base_change": item.changed,
                "output_error_before": item.before,
            }
            for item in results
        ],
    }


def _other_base(trained: PlacedAdapter, base: str | Path | None) -> list[str]:
    """A LoRA does not say which weights it was trained on, so its owner is told what its configuration names."""
    named = trained.adapter.base
    if base is None or named is None or named in (str(base), base_name(trained)) or trained.adapter.method == "MAP":
        return []
    return [f"the adapter's configuration names {named} as the base that it was trained on, and --base is {base}"]


def _nothing(served: PlacedAdapter) -> str:
    return (
        f"{served.target.folder} holds the weights that the adapter was trained on, so there is nothing to rebase: use "
        "the adapter as it is, or `mapconv upgrade`."
    )


def _worse(source: Path, numbers: ServedNumbers) -> str:
    return (
        f"the rebased adapter is further from {source} (KL {numbers.rebased.kl:.4g}) than the adapter as it is "
        f"({numbers.as_is.kl:.4g}), so nothing was written: give text of its domain with --data, raise --rank or "
        "--samples, or write it with --keep-worse."
    )
