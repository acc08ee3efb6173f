"""``mapconv report``."""

from __future__ import annotations

from pathlib import Path

import click

from mapconv.cli import options
from mapconv.cli.output import print_json, show, size


@click.command("report", short_help="Write an HTML report to look at.")
@click.argument("path", type=options.FOLDER)
@click.option("--out", "-o", type=options.FOLDER, required=True, metavar="FILE", help="HTML file to write.")
@click.option(
    "--png",
    type=options.FOLDER,
    metavar="FILE",
    help="Also the heat maps or distributions as one picture; needs matplotlib.",
)
@options.as_json
@click.option("--force", is_flag=True, help="Replace the files if they exist.")
def command(path: Path, out: Path, png: Path | None, as_json: bool, force: bool) -> None:
    """Write a report of PATH: a MAP adapter, or the output folder of a catalog run.

    The report is one HTML file that opens without a network: heat maps over the layers, how far the result is from
    its source, and a table to sort and filter; of a catalog its counts, distributions, failures and entries.
    """
    from mapconv.commands.report import report

    result = report(path, out, png=png, force=force)
    if as_json:
        print_json(result.to_dict())
        return
    what = "modules" if result.kind == "adapter" else "entries"
    show(f"{result.path} ({result.kind}, {result.items:,} {what}) → {result.out}")
    show(f"  {size(result.nbytes)}, {result.seconds:.1f} s; open it in any browser")
    if result.png is not None:
        show(f"  picture   {result.png}")
