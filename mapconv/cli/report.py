"""``mapconv report``."""

from __future__ import annotations

from mapconv.cli.options import Chosen, command
from mapconv.cli.output import print_json, show
from mapconv.options.commands import REPORT
from mapconv.wording import size


@command(REPORT, "Write an HTML report to look at.")
def report(chosen: Chosen) -> None:
    """Write a report of PATH: a MAP adapter, or the output folder of a catalog run.

    The report is one HTML file that opens without a network: heat maps over the layers, how far the result is from
    its source, and a table to sort and filter; for a catalog its counts, distributions, failures and entries.
    """
    from mapconv.commands.report import report

    result = report(**chosen.arguments)
    if chosen["as_json"]:
        print_json(result.to_dict())
        return
    what = "modules" if result.kind == "adapter" else "entries"
    show(f"{result.path} ({result.kind}, {result.items:,} {what}) → {result.out}")
    show(f"  {size(result.nbytes)}, {result.seconds:.1f} s; open it in any browser")
    if result.png is not None:
        show(f"  picture   {result.png}")
