"""``mapconv extract``."""

from __future__ import annotations

import statistics
from collections import defaultdict
from typing import TYPE_CHECKING

from mapconv.cli.options import Chosen, command
from mapconv.cli.output import EPSILON, explain, notes, print_json, print_table, show, show_loading
from mapconv.cli.startup import starting
from mapconv.hub.reference import shown
from mapconv.options.surgery import EXTRACT
from mapconv.wording import NONE, counted, fixed, rough_percent, size, small, spread

if TYPE_CHECKING:
    from mapconv.commands.extract import ExtractedModule, ExtractResult

#: What the last columns say, in lines for 80 columns.
_FLOOR = (
    "change is the size of the finetune's update beside its base. rounding is the share",
    "of the update that is rounding of the finetune's own dtype, which low ranks cannot",
    "follow.",
)


@command(EXTRACT, "Make an adapter of a full finetune.")
def extract(chosen: Chosen) -> None:
    """Make a MAP adapter of what the finetuned model FINETUNED changed in BASE.

    Both are read a block of rows at a time. Each weight that differs is refitted to the optimum at its rank; norms,
    biases, heads and tensors of another shape are carried as they are. Merged into BASE, the adapter gives FINETUNED
    back, up to ε in the refitted weights and exactly elsewhere.
    """
    with starting([], chosen["base"], whole_base=True, quiet=chosen["quiet"]):
        from mapconv.commands.extract import extract

    result = extract(**chosen.arguments)
    if chosen["as_json"]:
        print_json(result.to_dict())
    elif result.dry_run:
        show(f"{shown(result.finetuned)} beside {shown(result.base)} (cosine {result.cosine:.4f})")
        _counts(result, "would be ")
        show(f"  output     would write {result.out} (about {size(result.nbytes)})")
    else:
        _report(result)
    notes(result.notes)


def _report(result: ExtractResult) -> None:
    show(f"{shown(result.finetuned)} − {shown(result.base)} → {result.out} (MAP)")
    show()
    explain(EPSILON, _FLOOR)
    groups: dict[str, list[ExtractedModule]] = defaultdict(list)
    for module in result.modules:
        groups[module.path.rpartition(".")[2]].append(module)
    with_data = any(module.output_error is not None for module in result.modules)
    head = ["target", "modules", "rank", "α/‖W0‖", "change", "ε worst", "ε median", "rounding"]
    rows = [_row(name, modules, with_data=with_data) for name, modules in groups.items()]
    print_table(head + (["of outputs: worst"] if with_data else []), rows)
    show()
    errors = [module.error or 0.0 for module in result.modules]
    _counts(result, "")
    show(
        f"  {result.parameters:,} parameters, {size(result.nbytes)}, {result.seconds:.1f} s; ε worst "
        f"{small(max(errors))}, median {small(statistics.median(errors))}"
    )
    show_loading(result.out, result.base, plain_lora=result.plain_lora)


def _counts(result: ExtractResult, mood: str) -> None:
    show(f"  {mood}refitted   {counted(result.refitted, 'weight')}")
    if result.carried:
        show(f"  {mood}carried    {counted(result.carried, 'whole tensor')} ({size(result.carried_bytes)})")
    show(f"  unchanged  {counted(result.unchanged, 'tensor')}, left out")


def _row(name: str, modules: list[ExtractedModule], *, with_data: bool) -> list[str]:
    errors = [module.error or 0.0 for module in modules]
    seen = [module.output_error for module in modules if module.output_error is not None]
    return [
        name,
        str(len(modules)),
        spread([module.rank for module in modules], str),
        spread([module.base_gain for module in modules], fixed),
        rough_percent(statistics.median(module.change for module in modules)),
        small(max(errors)),
        small(statistics.median(errors)),
        small(statistics.median(module.floor for module in modules)),
        *([small(max(seen)) if seen else NONE] if with_data else []),
    ]
