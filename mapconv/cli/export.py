"""``mapconv export``."""

from __future__ import annotations

import statistics
import sys
from collections import defaultdict
from typing import TYPE_CHECKING

from mapconv.cli.options import Chosen, command
from mapconv.cli.output import EPSILON, explain, notes, print_json, print_table, show
from mapconv.cli.startup import starting
from mapconv.cli.upgrade import LARGE_ERROR
from mapconv.hub.reference import shown
from mapconv.options.exporting import EXPORT
from mapconv.wording import counted, size, small, spread

if TYPE_CHECKING:
    from mapconv.commands.export import ExportedModule, ExportResult


@command(EXPORT, "Write an adapter for another program.")
def export(chosen: Chosen) -> None:
    """Write ADAPTER, in any dialect that mapconv reads, in the form of another program.

    What the format holds is exact; what it cannot hold (a DoRA in a plain LoRA, two ranks where one is allowed) is
    refitted or padded, with the relative error ε measured. Heads, embeddings, biases and experts that it does not take
    are refused by name, or merged into a copy of the base with --fold-into.
    """
    with starting([chosen["source"]], chosen["base"], quiet=chosen["quiet"]):
        from mapconv.commands.export import export

    result = export(**chosen.arguments)
    if chosen["as_json"]:
        print_json(result.to_dict())
    elif chosen["check"]:
        _verdict(result)
    else:
        _report(result)
    notes(result.notes)
    if result.faults or result.refused:
        sys.exit(1)


def _verdict(result: ExportResult) -> None:
    what = f"{shown(result.source)} ({result.method}, {result.format})"
    if not result.faults:
        show(f"{what}: {result.server} loads it as it is")
        return
    show(f"{what}: {result.server} would not load it, or would compute something else:", "yellow")
    for fault in result.faults:
        show(f"  - {fault}")
    out = f"OUT{result.suffix or ''}"
    show(f"  write one that it loads: mapconv export {shown(result.source)} --for {result.server} -o {out}")


def _report(result: ExportResult) -> None:
    reader = f" for {result.server}" if result.server not in (None, result.format) else ""
    dry = "would be written: " if result.dry_run else ""
    show(f"{dry}{shown(result.source)} ({result.method}) → {result.out} ({result.format}{reader})")
    show()
    errors = [module.error for module in result.modules]
    if any(errors):
        explain(EPSILON)
    groups: dict[str, list[ExportedModule]] = defaultdict(list)
    for module in result.modules:
        groups[module.path.rpartition(".")[2]].append(module)
    print_table(["target", "modules", "rank", "ε worst", "ε median"], [_row(*group) for group in groups.items()])
    show()
    rank = f"rank {result.rank}" if result.rank else "each at its own rank"
    exact = "exact" if not any(errors) else f"ε worst {small(max(errors))}, median {small(statistics.median(errors))}"
    if result.dry_run and any(errors):
        kept = sum(not error for error in errors)
        exact = f"{kept} exact, {len(errors) - kept} refitted: {exact}"
    show(f"  {counted(len(errors), 'module')}, {rank}, {size(result.nbytes)}, {result.seconds:.1f} s; {exact}")
    if max(errors) > LARGE_ERROR and result.method != "LoRA":
        show("  advice: a higher --rank, or --tolerance EPS, brings it closer to the source")
    if result.fold_into is not None:
        show(f"  merged into the base {result.fold_into}: {', '.join(result.folded)}")
    if result.refused:
        show(f"  refused without --fold-into BASE_OUT: {', '.join(result.refused)}", "yellow")


def _row(name: str, modules: list[ExportedModule]) -> list[str]:
    errors = [module.error for module in modules]
    ranks = spread([module.rank for module in modules], str)
    return [name, str(len(modules)), ranks, small(max(errors)), small(statistics.median(errors))]
