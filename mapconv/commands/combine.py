"""Make one adapter of several: place them on their base, combine weight by weight, write the result whole or not."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mapconv.adapter import Direction, MapModule
from mapconv.algebra.mixing import Method
from mapconv.algebra.moments import Statistics
from mapconv.commands.refitting import Refitting, Result, data_notes, missed_tolerance
from mapconv.errors import UnsupportedError
from mapconv.formats.mapdir import needs_magnitude
from mapconv.options.shared import MAX_RANK, SAMPLES, SEQUENCE_LENGTH, STATISTICS
from mapconv.options.surgery import COMBINE
from mapconv.placement.adapters import PlacedAdapter, place_apart
from mapconv.placement.base_check import accepted_note
from mapconv.placement.union import Shared, combined_adapter, shared_weights, whole_tensors
from mapconv.refit.combination import CombineOptions, Combiner
from mapconv.refit.combine_writer import Combination, write_combination
from mapconv.refit.directory import measured
from mapconv.refit.norms import BaseNorms
from mapconv.refit.plan import NO_DORA_OF_STACKS, Dtype
from mapconv.refit.targets.sums import needs_base
from mapconv.refit.whole import settle_whole
from mapconv.refit.writer import read_data
from mapconv.runtime.devices import resolve_device
from mapconv.wording import counted


@dataclass(frozen=True, kw_only=True)
class CombineResult(Result):
    """What a combination wrote; ``exact``: it is the sum itself, but for the rounding of its factors' dtype."""

    sources: tuple[Path, ...]
    weights: tuple[float, ...]
    weights_combined: int
    carried: int
    exact: bool


@COMBINE.checks
def combine(
    adapters: Sequence[str | Path],
    out: str | Path | None = None,
    *,
    base: str | Path | None = None,
    weights: Sequence[float] | None = None,
    method: Method = "sum",
    density: float | None = None,
    seed: int | None = None,
    whole: str | None = None,
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
    allow_pickle: bool = False,
    force: bool = False,
    dry_run: bool = False,
    quiet: bool = True,
) -> CombineResult:
    """Make one MAP adapter of several adapters of one base: T = W0 + Σ w_i·(T_i − W0).

    T_i is the weight that adapter i makes by itself. Of two DoRAs on one weight this is the sum of what each does
    alone, where PEFT merges one after the other, so that its result depends on their order.

    Args:
        adapters: LoRA, DoRA and MAP adapters: folders or Hub references.
        out: the folder to write; None: ``<first>-combined`` beside the first one.
        base: the base model; None takes it from the first adapter's configuration.
        weights: a factor for each adapter's change, negative ones included; None: 1 for each.
        method: ``sum``; ``ties`` and ``dare-ties`` average the changes that have the sign of their sum, element by
            element, after dropping the smallest of each (``ties``) or some at random; ``dare`` adds up what is left
            after dropping at random.
        density: the share of elements that ``ties`` and ``dare`` keep of each change.
        seed: of the random choice (0).
        whole: heads and other tensors that adapters bring whole and that disagree: ``first``, ``mean`` (by weights), or
            the name of the adapter whose tensors count; None refuses them.
        rank: rank of the result; None: of a sum of LoRAs all of it, which is exact; else the ranks together.
        tolerance: instead of ``rank``: the smallest rank of each module whose ε is at most this, up to ``max_rank``.
        direction: ``low-rank``: Δ = BA. ``dora``: keep T's row norms, and approximate the rows' directions.
        lora_compatible: keep a = 1, so that the result is a plain LoRA adapter as well.
        dtype: of the stored factors: ``float32``, ``bfloat16``, ``float16``, or ``auto`` for the first adapter's own.
        data: text that the result is for. What a rank leaves out is then weighed by the inputs that the combined
            model gives its layers on it; ``tolerance`` is of the outputs as well.
        samples: sequences of ``data`` to run (32), each of ``sequence_length`` tokens (256).
        statistics: of a layer's inputs: ``full`` second moments, or their ``diagonal``, which takes less memory.
        device: ``auto``, ``cpu`` or ``cuda``: where refits run.
        allow_pickle: read weights from ``.bin`` files.
        force: replace ``out``, and accept a base that a MAP adapter was not made for.
        dry_run: plan and check, write nothing.
        quiet: no progress bar.

    Raises:
        MapconvError: of the kind that fits; ``out`` then does not exist.
        ValueError: an option out of its range, or options that cannot be used together.
    """
    started = time.perf_counter()
    names = [str(adapter) for adapter in adapters]
    refitting = Refitting.of(adapters, out, "combined", allow_pickle=allow_pickle)
    # To run the model takes all of a base on the Hub.
    fetch = "ranges" if data is None else "whole"
    placed = place_apart(refitting.sources, base, allow_pickle=allow_pickle, fetch=fetch)
    options = CombineOptions(
        tuple(weights or [1.0] * len(adapters)),
        method,
        1.0 if density is None else density,
        seed or 0,
        rank,
        tolerance,
        max_rank or MAX_RANK.fallback,
        direction,
        lora_compatible,
        dtype,
        resolve_device(device),
        None if data is None else statistics or STATISTICS.fallback,
    )
    for item, name in zip(placed, names, strict=True):
        _require_factors(item, name)
    shared = shared_weights(placed)
    wholes = settle_whole(whole_tensors(placed, shared), names, options.weights, whole)
    stacked, notes = any(item.item.experts > 1 for item in shared), []
    if stacked and direction == "dora":
        raise UnsupportedError(
            "PEFT has no DoRA for stacks of experts, which these adapters have: leave --direction dora out."
        )
    if stacked and not lora_compatible and Combiner.needs_gains(options, shared):
        options = replace(options, lora_compatible=True)
        notes.append(NO_DORA_OF_STACKS)
    combined = combined_adapter(placed, shared, wholes.carried)
    nbytes = sum(sum(item.item.weight.shape) * options.wanted(item).rank * 4 for item in shared) + wholes.nbytes
    target = combined.target
    refitting.check_output(target.checkpoint, nbytes=nbytes, force=force)
    thin = method == "sum" and direction == "low-rank"
    thin = thin and not any(needs_base(part) for item in shared for _, part in item.parts)
    sample, wanted = None, samples or SAMPLES.fallback
    if data is not None:
        _require_loss(options, shared, thin=thin)
        length = sequence_length or SEQUENCE_LENGTH.fallback
        sample = read_data(Path(data), target, samples=wanted, length=length)
    modules: tuple[MapModule, ...] = ()
    parameters, norms = 0, BaseNorms(target.checkpoint)
    if not dry_run:
        with refitting.staged(target.checkpoint, force=force) as staging:
            made = Combination(combined, placed, shared, wholes, options, names, norms, force)
            modules, accepted = write_combination(made, staging, sample, quiet=quiet)
            notes += accepted_note(accepted)
            parameters, nbytes = measured(staging, modules)
        notes += missed_tolerance(modules, tolerance, options.max_rank)
        if not any(module.direction_norm or module.base_gain != 1 for module in modules):
            notes.append("the weighed changes cancel: this adapter changes none of the weights")
    if sample is not None:
        notes += data_notes(sample, wanted, modules)
    notes += dict.fromkeys(note for item in placed for note in (*item.adapter.notes, *item.target.notes))
    return CombineResult(
        out=refitting.out,
        sources=refitting.sources,
        weights=options.weights,
        base=target.folder,
        method=method,
        modules=modules,
        weights_combined=len(shared),
        carried=wholes.count,
        exact=thin and options.keeps_all,
        parameters=parameters,
        nbytes=nbytes,
        seconds=time.perf_counter() - started,
        dry_run=dry_run,
        plain_lora=not needs_magnitude(modules),
        notes=(*_other_bases(placed), *notes, *wholes.notes, *norms.notes),
    )


def _require_factors(placed: PlacedAdapter, name: str) -> None:
    """Refuse an adapter whose effect is not its factors' and PEFT's own: it has to be refitted first.

    Raises:
        UnsupportedError: with the way to do that.
    """
    if not placed.adapter.modules and not placed.adapter.additions:
        raise UnsupportedError(
            f"{name} ({placed.adapter.method}) brings whole tensors alone, which have no sum: merge it."
        )
    odd = [
        module
        for module in placed.adapter.modules
        if module.method is not None or module.delta is not None or (module.magnitude and not module.rescaling.is_peft)
    ]
    if odd or placed.adapter.additions:
        what = odd[0].path if odd else next(iter(placed.adapter.additions))
        raise UnsupportedError(
            f"{name} changes {what} in a way that factors do not hold: make a MAP adapter of it with `mapconv upgrade "
            "--rank N` first, and combine that."
        )


def _require_loss(options: CombineOptions, shared: Sequence[Shared], *, thin: bool) -> None:
    """Refuse a text where nothing is left out that its inputs could weigh.

    Raises:
        UnsupportedError: with the rank that would leave something out.
    """
    most = max(item.rank for item in shared)
    if thin and (options.keeps_all or (options.rank is not None and options.rank >= most)):
        raise UnsupportedError(
            "the sum of these LoRAs is exact, so that --data has nothing to improve: leave it out, or cut the sum with "
            f"--tolerance or a --rank below {most}."
        )


def _other_bases(placed: Sequence[PlacedAdapter]) -> list[str]:
    """LoRAs do not say which weights they were trained on, so their owner is told what their configurations name."""
    named = {item.adapter.base for item in placed if item.adapter.base}
    if len(named) < 2:
        return []
    shown = ", ".join(sorted(named))
    return [
        f"the adapters' configurations name {counted(len(named), 'base')}, and their sum is only right on one: {shown}"
    ]
