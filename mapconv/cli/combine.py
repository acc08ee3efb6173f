"""``mapconv combine``."""

from __future__ import annotations

import statistics
from collections import defaultdict
from typing import TYPE_CHECKING

from mapconv.cli.options import Chosen, command
from mapconv.cli.output import EPSILON, explain, notes, print_json, print_table, show, show_loading
from mapconv.cli.startup import starting
from mapconv.hub.reference import shown
from mapconv.options.surgery import COMBINE
from mapconv.wording import NONE, counted, fixed, size, small, spread

if TYPE_CHECKING:
    from mapconv.adapter import MapModule
    from mapconv.commands.combine import CombineResult


@command(COMBINE, "Make one adapter of several.")
def combine(chosen: Chosen) -> None:
    """Combine several adapters (ADAPTER) of one base: W0 + Σ w·(T − W0), with T the weight that each makes alone.

    A sum of LoRAs is exact: their ranks add up, and what depends on the rest is left out. With --rank or --tolerance
    the result is the optimum of the sum, with --data that of its layers' outputs. DoRA and MAP adapters count with what
    they do by themselves; two DoRAs on one weight add up too, where merging one after the other would depend on their
    order.
    """
    with starting(chosen["adapters"], chosen["base"], whole_base=chosen["data"] is not None, quiet=chosen["quiet"]):
        from mapconv.commands.combine import combine

    result = combine(**chosen.arguments)
    if chosen["as_json"]:
        print_json(result.to_dict())
    else:
        _report(result)
    notes(result.notes)


def _report(result: CombineResult) -> None:
    terms = " + ".join(f"{w:g} × {shown(source)}" for w, source in zip(result.weights, result.sources, strict=True))
    show(f"{terms} ({result.method})")
    show(f"  on {shown(result.base)} → {result.out} (MAP)")
    carried = f", {counted(result.carried, 'whole tensor')} carried" if result.carried else ""
    if result.dry_run:
        show(f"  would combine {counted(result.weights_combined, 'weight')}{carried} (about {size(result.nbytes)})")
        return
    show()
    explain(EPSILON)
    groups: dict[str, list[MapModule]] = defaultdict(list)
    for module in result.modules:
        groups[module.path.rpartition(".")[2]].append(module)
    with_data = any(module.output_error is not None for module in result.modules)
    print_table(
        ["target", "modules", "rank", "α/‖W0‖", "ε worst", "ε median"]
        + (["of outputs: worst", "median"] if with_data else []),
        [_row(name, modules, with_data=with_data) for name, modules in groups.items()],
    )
    show()
    errors = [module.error or 0.0 for module in result.modules]
    show(
        f"  {counted(len(errors), 'module')}{carried}, {result.parameters:,} parameters, {size(result.nbytes)}, "
        f"{result.seconds:.1f} s; ε worst {small(max(errors))}, median {small(statistics.median(errors))}"
    )
    show_loading(result.out, result.base, plain_lora=result.plain_lora)


def _row(name: str, modules: list[MapModule], *, with_data: bool) -> list[str]:
    errors = [module.error or 0.0 for module in modules]
    seen = [module.output_error for module in modules if module.output_error is not None]
    of_outputs = [small(max(seen)), small(statistics.median(seen))] if seen else [NONE, NONE]
    return [
        name,
        str(len(modules)),
        spread([module.rank for module in modules], str),
        spread([module.base_gain for module in modules], fixed),
        small(max(errors)),
        small(statistics.median(errors)),
        *(of_outputs if with_data else []),
    ]
