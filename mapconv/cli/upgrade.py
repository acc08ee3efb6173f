"""``mapconv upgrade``."""

from __future__ import annotations

import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mapconv.cli.calibrate import INTERRUPTED, print_calibration
from mapconv.cli.options import Chosen, command
from mapconv.cli.output import EPSILON, SCALARS, explain, notes, print_json, print_table, show, show_loading
from mapconv.cli.startup import starting
from mapconv.hub.reference import shown
from mapconv.options.commands import UPGRADE
from mapconv.options.shared import MAX_RANK
from mapconv.wording import NONE, counted, fixed, rough_seconds, size, small, spread

if TYPE_CHECKING:
    from mapconv.adapter import MapModule
    from mapconv.commands.upgrade import UpgradeResult

#: Above this ε, half of what the adapter does to a weight's direction is lost there: worth a word of advice.
LARGE_ERROR = 0.1


@command(UPGRADE, "Convert a LoRA or DoRA adapter to MAP form.")
def upgrade(chosen: Chosen) -> None:
    """Convert the LoRA or DoRA adapter in SOURCE, a folder or a Hub id (owner/name), to MAP form.

    A LoRA converts exactly. A DoRA is refitted: the closest MAP weight of the same rank, solved to the optimum, with
    its relative error ε for each module. The result is a folder that stock PEFT loads.

    With --rank, --tolerance or --rank-at-most a LoRA is resized: cut to its best approximation, which is a LoRA again.
    That takes seconds, as it reads no weight and forms no matrix.
    """
    with starting([chosen["source"]], chosen["base"], whole_base=chosen["data"] is not None, quiet=chosen["quiet"]):
        from mapconv.commands.upgrade import upgrade

    result, dry_run = upgrade(**chosen.arguments), chosen["dry_run"]
    if chosen["as_json"]:
        print_json(result.to_dict())
    elif dry_run:
        _show_plan(result)
    else:
        _report(result, chosen)
    notes(result.notes)
    if result.calibration is not None and result.calibration.interrupted:
        sys.exit(INTERRUPTED)


def _show_plan(result: UpgradeResult) -> None:
    """What would be done, and roughly what it takes."""
    plan = result.plan
    what = f"would convert {counted(plan.modules, 'module')}"
    show(f"{shown(result.source)} ({result.method}) on {shown(result.base)}: {what}")
    kept = f"  kept      {plan.exact:,} in their own factors, exactly"
    show(f"{kept}; {counted(plan.whole, 'other tensor')} copied unchanged" if plan.whole else kept)
    show(f"  refitted  {plan.refitted:,} to the closest MAP weight")
    ranks = str(plan.ranks[0]) if len(plan.ranks) == 1 else f"{plan.ranks[0]} to {plan.ranks[-1]}"
    chosen = f"the smallest with ε ≤ {plan.tolerance:g}; the source's is {ranks}" if plan.tolerance else ranks
    show(f"  rank      {chosen}")
    if plan.tokens:
        show(f"  data      {counted(plan.sequences, 'sequence')}, {counted(plan.tokens, 'token')}: fits layer outputs")
    show(f"  output    would write {result.out} ({'about ' if plan.tolerance else ''}{size(plan.nbytes)})")
    if plan.seconds is not None and plan.memory is not None:
        show(f"  takes     roughly {rough_seconds(plan.seconds)} and {size(float(f'{plan.memory:.1g}'))} of memory")


def _report(result: UpgradeResult, chosen: Chosen) -> None:
    groups = defaultdict(list)
    for module in result.modules:
        groups[module.path.rpartition(".")[2]].append(module)
    show(f"{shown(result.source)} ({result.method}) → {result.out} (MAP)")
    show()
    explain(SCALARS, EPSILON)
    with_data = any(module.output_error is not None for module in result.modules)
    print_table(
        ["target", "modules", "rank", "α/‖W0‖", "β/α", "ε worst", "ε median"]
        + (["of outputs: worst", "median"] if with_data else []),
        [_row(name, modules, with_data=with_data) for name, modules in groups.items()],
    )
    errors = [module.measured_error for module in result.modules]
    show()
    show(
        f"  {counted(len(errors), 'module')}, {result.parameters:,} parameters, {size(result.nbytes)}, "
        f"{result.seconds:.1f} s; "
        f"ε worst {small(max(errors))}, median {small(statistics.median(errors))}",
        "yellow" if max(errors) > LARGE_ERROR else None,
    )
    if result.calibration is not None:
        show()
        print_calibration(result.calibration)
    show_loading(result.out, result.base, plain_lora=result.plain_lora)
    advice = advice_for(result, chosen)
    if advice:
        show(f"  advice: {advice}")


def _row(name: str, modules: list[MapModule], *, with_data: bool) -> list[str]:
    seen = [module.output_error for module in modules if module.output_error is not None]
    of_outputs = [small(max(seen)), small(statistics.median(seen))] if seen else [NONE, NONE]
    return [
        name,
        str(len(modules)),
        spread([module.rank for module in modules], str),
        spread([module.base_gain for module in modules], fixed),
        spread([module.beta / module.alpha if module.alpha else 0.0 for module in modules], fixed),
        small(max(module.measured_error for module in modules)),
        small(statistics.median(module.measured_error for module in modules)),
        *(of_outputs if with_data else []),
    ]


def advice_for(result: UpgradeResult, chosen: Mapping[str, Any]) -> str | None:
    """What else the user may try where ε is large: only options that can be added to those that were chosen."""
    tolerance = chosen["tolerance"]
    exact = [] if chosen["lora_compatible"] or result.method != "DoRA" else ["--direction dora is exact"]
    if tolerance is not None:
        return _advice_on_tolerance(result.modules, tolerance, chosen["max_rank"] or MAX_RANK.fallback, exact)
    worst = max((_felt_error(module) for module in result.modules), default=0.0)
    if worst <= LARGE_ERROR:
        return None
    if result.method == "LoRA":
        option = "--rank" if chosen["rank"] else "--rank-at-most"
        return f"ε is large because {option} is below the source's own rank: without {option} the result is exact"
    ways = [] if chosen["data"] is not None else ["--data FILE fits layer outputs instead of weights"]
    if chosen["rank"] is None:
        ways += [*exact, "--tolerance 0.1 chooses ranks"]
    else:
        ways += [f"a --rank above {chosen['rank']} lowers it", *(f"without --rank, {way}" for way in exact)]
    if chosen["lora_compatible"]:
        ways.append("without --lora-compatible α is free")
    reason = "the rank is too low" if chosen["rank"] is not None else "DoRA's magnitudes do not fit in this rank"
    return f"ε is large because {reason}: {', '.join(ways)}; `mapconv verify` shows what it means for the outputs"


def _advice_on_tolerance(
    modules: Sequence[MapModule], tolerance: float, max_rank: int, exact: Sequence[str]
) -> str | None:
    """What to do about modules that a tolerance could not be met for: at the highest rank allowed, or at their own."""
    over = [module for module in modules if _felt_error(module) > tolerance]
    if not over:
        return None
    held = sum(module.rank == max_rank for module in over)
    parts = []
    if held:
        parts.append(f"{_stay(held)} above ε = {tolerance:g} at --max-rank {max_rank}: raise it")
    if len(over) > held:
        # A full rank leaves nothing but the rounding of its factors.
        parts.append(f"{_stay(len(over) - held)} above it at full rank, by rounding: --dtype float32")
    if exact:
        parts.append("or use --direction dora in place of --tolerance")
    return "; ".join(parts)


def _stay(count: int) -> str:
    return "1 module stays" if count == 1 else f"{count} modules stay"


def _felt_error(module: MapModule) -> float:
    """ε of the outputs where data was seen, which is what was minimised there; else of the weights."""
    return module.measured_error if module.output_error is None else module.output_error
