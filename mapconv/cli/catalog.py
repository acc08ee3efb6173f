"""``mapconv catalog``."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import click

from mapconv.cli.options import Chosen, command
from mapconv.cli.output import notes, print_json, print_table, say, show
from mapconv.options.commands import CATALOG_RUN, CATALOG_STATUS
from mapconv.wording import counted, size, small

if TYPE_CHECKING:
    from mapconv.catalog.status import Status
    from mapconv.commands.catalog import CatalogResult

#: Seconds between two looks of ``status --watch``.
REFRESH = 1.0


@click.group("catalog", short_help="Convert thousands of adapters, resumably.")
def catalog() -> None:
    """Convert every adapter of a catalog, and show a run's progress.

    A run may be stopped or killed at any moment: the same command continues where it was.
    """


@command(CATALOG_RUN, "Convert every adapter of a catalog.", group=catalog)
def run(chosen: Chosen) -> None:
    """Convert every adapter that CATALOG names (YAML or JSONL, or a folder of adapters) into a folder below OUT.

    OUT/ledger.jsonl records the outcome of each. Finished entries are skipped, and a broken adapter does not stop the
    others; exits 1 if any failed.
    """
    from mapconv.commands.catalog import convert_catalog

    try:
        result = convert_catalog(**chosen.arguments)
    except KeyboardInterrupt:
        say("mapconv: error: interrupted: finished entries are kept, run the same command again to continue.")
        sys.exit(130)
    if chosen["as_json"]:
        print_json(result.to_dict())
    else:
        _report(result)
    notes(result.notes)
    if result.failed:
        sys.exit(1)


def _report(result: CatalogResult) -> None:
    rate = f", {result.converted / result.seconds:.2f} a second" if result.converted else ""
    show(f"{result.catalog} → {result.out}: {counted(result.entries, 'adapter')}")
    show(
        f"  {result.done:,} done ({result.converted:,} now, {size(result.nbytes)}), {result.failed:,} failed, "
        f"{result.left:,} left; {result.seconds:.1f} s{rate}"
    )
    for kind in result.by_kind:
        show(f"  {kind.count:,} × {kind.kind}, such as {kind.entry}: {_one_line(kind.error)}")
    if result.failed:
        show("  failed entries are retried when their files change, or with --retry-failed")


@command(CATALOG_STATUS, "Show a run's progress.", group=catalog)
def status(chosen: Chosen) -> None:
    """Show the progress of the run in OUT: counts, time left, failures by kind, the slowest and the least faithful."""
    out, watch, as_json = chosen["out"], chosen["watch"], chosen["as_json"]
    from mapconv.catalog.status import read_status

    found = read_status(out)
    while watch and not as_json and found.running:
        click.clear()
        _show(found)
        time.sleep(REFRESH)
        found = read_status(out)
    if as_json:
        print_json(found.to_dict())
    else:
        if watch:
            click.clear()
        _show(found)


def _show(found: Status) -> None:
    total = found.entries or found.done + found.failed
    width = 40
    filled = width * (found.done + found.failed) // max(1, total)
    state = "running" if found.running else "finished" if not found.left else "stopped"
    show(f"{found.out} ({state}{f', {found.engine} × {found.workers}' if found.engine else ''})")
    show(f"  [{'█' * filled}{'·' * (width - filled)}] {found.done + found.failed:,} of {total:,}")
    words = [f"{found.done:,} done", f"{found.failed:,} failed", f"{found.left:,} left", size(found.nbytes)]
    if found.per_second:
        words.append(f"{found.per_second:.2f} a second")
    if found.seconds_left is not None:
        words.append(f"{duration(found.seconds_left)} left")
    show(f"  {', '.join(words)}")
    for kind in found.by_kind:
        show(f"  {kind['count']:,} × {kind['kind']}, such as {kind['entry']}: {_one_line(kind['error'])}")
    if found.slowest:
        show()
        print_table(["slowest", "seconds"], [[name, f"{seconds:.1f}"] for name, seconds in found.slowest])
    if found.least_faithful:
        show()
        print_table(
            ["least faithful", "ε worst", "KL"],
            [[name, small(error), small(kl)] for name, error, kl in found.least_faithful],
        )
    notes(found.notes)


def duration(seconds: float) -> str:
    """``45 s``, ``12 min`` or ``3.4 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 160 else f"{line[:157]}..."
