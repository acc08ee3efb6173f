"""``mapconv rebase``."""

from __future__ import annotations

import statistics
import sys
from collections import defaultdict
from typing import TYPE_CHECKING

from mapconv.cli.calibrate import INTERRUPTED, print_calibration
from mapconv.cli.options import Chosen, command
from mapconv.cli.output import notes, print_json, print_table, show
from mapconv.cli.served import show_served
from mapconv.cli.startup import starting
from mapconv.hub.reference import shown
from mapconv.options.commands import REBASE
from mapconv.wording import NONE, counted, size, small, spread

if TYPE_CHECKING:
    from mapconv.commands.rebase import RebaseResult


@command(REBASE, "Refit an adapter for another base, such as a quantized one.")
def rebase(chosen: Chosen) -> None:
    """Refit the adapter in SOURCE for the base that it is served on.

    An adapter is fitted to the weights that it was trained on. On a quantized, pruned or continued copy of them (OTHER)
    its outputs differ. The result is an adapter for OTHER whose layers give the outputs of the source on its own base,
    as nearly as its rank allows, and it makes up for what OTHER lost. By default it is a plain LoRA.
    """
    with starting([chosen["source"]], chosen["base"], whole_base=True, quiet=chosen["quiet"]):
        from mapconv.commands.rebase import rebase

    result = rebase(**chosen.arguments)
    if chosen["as_json"]:
        print_json(result.to_dict())
    elif result.dry_run:
        show(f"would rebase {result.method} adapter {shown(result.source)} from {shown(result.base)}")
        show(f"would write {result.out} for {shown(result.onto)} (about {size(result.nbytes)})")
    else:
        _report(result)
    notes(result.notes)
    if result.calibration is not None and result.calibration.interrupted:
        sys.exit(INTERRUPTED)


def _report(result: RebaseResult) -> None:
    show(f"{shown(result.source)} ({result.method}), trained on {shown(result.base)} → {result.out}")
    show(f"  for {shown(result.onto)}")
    show()
    groups = defaultdict(list)
    for module in result.modules:
        groups[module.path.rpartition(".")[2]].append(module)
    rows = []
    for name, modules in groups.items():
        seen = [module.output_error for module in modules if module.output_error is not None]
        of_outputs = [small(max(seen)), small(statistics.median(seen))] if seen else [NONE, NONE]
        rank = spread([module.rank for module in modules], str)
        errors = [module.measured_error for module in modules]
        rows.append([name, str(len(modules)), rank, small(statistics.median(errors)), *of_outputs])
    print_table(["target", "modules", "rank", "ε of weights", "of outputs: worst", "median"], rows)
    show()
    show(
        f"  {counted(len(result.modules), 'module')}, {result.parameters:,} parameters, {size(result.nbytes)}, "
        f"{result.seconds:.1f} s"
    )
    if result.calibration is not None:
        show()
        print_calibration(result.calibration)
    if result.served is not None:
        show()
        show_served(result.served)
    also = "a plain LoRA" if result.plain_lora else "a DoRA"
    show(f"  stock PEFT loads it as {also} adapter on {shown(result.onto)}")
