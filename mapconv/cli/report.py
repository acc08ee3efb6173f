"""``mapconv report``."""

from __future__ import annotations

from mapconv.cli.options import Chosen, command
from mapconv.cli.output import print_json, show
from mapconv.options.commands import REPORT
from mapconv.wording import size


@command(REPORT, "Write an HTML report to look at.")
def report(chosen: Chosen) -> None:
    """Write a report of PATH: a MAP adapter, a merged model, or the output folder of a catalog run.

    The report is one HTML file that opens without a network: heat maps over the layers, how far the result is from
    its source (of a merged model: what of the update survives in its weights), and a table to sort and filter; for a
    catalog its counts, distributions, failures and entries.
    """
    from mapconv.commands.report import report

    result = report(**chosen.arguments)
    if chosen["as_json"]:
        print_json(result.to_dict())
        return
    what = {"adapter": "modules", "merged": "merged tensors", "catalog": "entries"}[result.kind]
    show(f"{result.path} ({result.kind}, {result.items:,} {what}) → {result.out}")
    show(f"  {size(result.nbytes)}, {result.seconds:.1f} s; open it in any browser")
    if result.png is not None:
        show(f"  picture   {result.png}")
