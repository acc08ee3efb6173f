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
from mapconv.wording import NONE, counted, rough_seconds, size, small, spread

if TYPE_CHECKING:
    from mapconv.commands.rebase import RebaseResult

#: Above this median, ε of the weights needs a word.
FAR = 0.5


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
        _show_plan(result)
    else:
        _report(result)
    notes(result.notes)
    if result.calibration is not None and result.calibration.interrupted:
        sys.exit(INTERRUPTED)


def _show_plan(result: RebaseResult) -> None:
    """What would be done, and roughly what it takes."""
    plan = result.plan
    assert plan is not None  # a dry run's
    show(f"{shown(result.source)} ({result.method}), trained on {shown(result.base)}")
    show(f"  for {shown(result.onto)}: would refit {counted(plan.modules, 'module')}")
    if plan.added:
        show(f"  of these  {plan.added:,} that the source leaves alone and the other base changed")
    if plan.whole:
        show(f"  kept      {counted(plan.whole, 'other tensor')} copied unchanged")
    ranks = str(plan.ranks[0]) if len(plan.ranks) == 1 else f"{plan.ranks[0]} to {plan.ranks[-1]}"
    if plan.tolerance:
        ranks = f"the smallest with ε ≤ {plan.tolerance:g}; the source's is {ranks}"
    elif plan.spread:
        ranks = f"{ranks} on average, where it brings outputs closest"
    show(f"  rank      {ranks}")
    ways = {
        "data": "the layers' inputs on --data",
        "samples": "the layers' inputs on text that the source writes",
        "statistics": "the base's inputs in --statistics-from",
        "weights": "the weights alone",
    }
    counts = f": {counted(plan.sequences, 'sequence')}, {counted(plan.tokens, 'token')}" if plan.tokens else ""
    show(f"  fitted to {ways[plan.by]}{counts}")
    runs = {0: "no model", 1: "the source", 2: "the source and the rebased model side by side"}
    show(f"  runs      {runs[plan.models]}")
    if plan.steps:
        show(f"  trained   {counted(plan.steps, 'step')}, with both bases in float32 in memory")
    show(f"  output    would write {result.out} ({'about ' if plan.tolerance else ''}{size(plan.nbytes)})")
    show(f"  takes     roughly {rough_seconds(plan.seconds)} and {size(float(f'{plan.memory:.1g}'))} of memory")


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
    errors = [module.measured_error for module in result.modules if module.output_error is not None]
    if errors and statistics.median(errors) > FAR:
        show("  ε of weights is large where no low rank holds what the bases differ by; what was fitted is the outputs")
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
