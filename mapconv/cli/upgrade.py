"""``mapconv upgrade``."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from mapconv.cli.calibrate import INTERRUPTED, print_calibration
from mapconv.cli.options import Chosen, command
from mapconv.cli.output import notes, print_json, print_table, show, size, small, spread
from mapconv.cli.startup import starting
from mapconv.hub.reference import shown
from mapconv.options.commands import UPGRADE
from mapconv.options.shared import MAX_RANK
from mapconv.wording import counted

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
    """
    with starting([chosen["source"]], chosen["base"], whole_base=chosen["data"] is not None, quiet=chosen["quiet"]):
        from mapconv.commands.upgrade import upgrade

    result, dry_run, tolerance = upgrade(**chosen.arguments), chosen["dry_run"], chosen["tolerance"]
    max_rank = chosen["max_rank"] or MAX_RANK.fallback
    if chosen["as_json"]:
        print_json(result.to_dict())
    elif dry_run:
        show(f"would convert {counted(result.planned, f'{result.method} module')} on {shown(result.base)}")
        show(f"would write {result.out} (about {size(result.nbytes)})")
    else:
        _report(result, tolerance, max_rank)
    notes(result.notes)
    if result.calibration is not None and result.calibration.interrupted:
        raise click.exceptions.Exit(INTERRUPTED)


def _report(result: UpgradeResult, tolerance: float | None, max_rank: int) -> None:
    groups = defaultdict(list)
    for module in result.modules:
        groups[module.path.rpartition(".")[2]].append(module)
    show(f"{shown(result.source)} ({result.method}) → {result.out} (MAP)")
    show()
    with_data = any(module.output_error is not None for module in result.modules)
    print_table(
        ["target", "modules", "rank", "α/‖W0‖", "β/α", "ε worst", "ε median"]
        + (["of outputs: worst", "median"] if with_data else []),
        [_row(name, modules, with_data=with_data) for name, modules in groups.items()],
    )
    errors = [module.error for module in result.modules]
    show()
    show(
        f"  {counted(len(errors), 'module')}, {result.parameters:,} parameters, {size(result.nbytes)}, "
        f"{result.seconds:.1f} s; "
        f"ε worst {small(max(errors))}, median {small(statistics.median(errors))}"
    )
    if result.calibration is not None:
        show()
        print_calibration(result.calibration)
    also = "a plain LoRA" if result.plain_lora else "a DoRA"
    show(f"  stock PEFT loads it as {also} adapter: PeftModel.from_pretrained(base, {str(result.out)!r})")
    advice = _advice(result, tolerance, max_rank)
    if advice:
        show(f"  advice: {advice}")


def _row(name: str, modules: list[MapModule], *, with_data: bool) -> list[str]:
    ranks = sorted({module.rank for module in modules})
    seen = [module.output_error for module in modules if module.output_error is not None]
    of_outputs = [small(max(seen)), small(statistics.median(seen))] if seen else ["-", "-"]
    return [
        name,
        str(len(modules)),
        str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} … {ranks[-1]}",
        spread([module.base_gain for module in modules]),
        spread([module.beta / module.alpha if module.alpha else 0.0 for module in modules]),
        small(max(module.error for module in modules)),
        small(statistics.median(module.error for module in modules)),
        *(of_outputs if with_data else []),
    ]


def _advice(result: UpgradeResult, tolerance: float | None, max_rank: int) -> str | None:
    if tolerance is not None:
        return _advice_on_tolerance(result.modules, tolerance, max_rank)
    worst = max((_felt_error(module) for module in result.modules), default=0.0)
    if worst <= LARGE_ERROR:
        return None
    if result.method == "LoRA":
        return "ε is large because --rank is below the source's own rank: without --rank the result is exact"
    has_data = any(module.output_error is not None for module in result.modules) or result.calibration is not None
    fit = "" if has_data else "--data FILE fits the outputs, "
    return (
        f"ε is large where DoRA's magnitudes do not fit in this rank: {fit}--direction dora is exact, "
        "--tolerance 0.1 chooses ranks, and `mapconv verify` shows what it means for the outputs"
    )


def _advice_on_tolerance(modules: Sequence[MapModule], tolerance: float, max_rank: int) -> str | None:
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
    return "; ".join(parts) + "; or use --direction dora"


def _stay(count: int) -> str:
    return "1 module stays" if count == 1 else f"{count} modules stay"


def _felt_error(module: MapModule) -> float:
    """ε of the outputs where data was seen, which is what was minimised there; else of the weights."""
    return module.error if module.output_error is None else module.output_error
