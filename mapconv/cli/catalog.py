"""``mapconv catalog``."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mapconv.cli import options
from mapconv.cli.output import notes, print_json, print_table, say, size, small
from mapconv.wording import counted

if TYPE_CHECKING:
    from mapconv.catalog.status import Status
    from mapconv.commands.catalog import CatalogResult

#: Seconds between two looks of ``status --watch``.
REFRESH = 1.0


@click.group("catalog", short_help="Convert thousands of adapters, resumably.")
def command() -> None:
    """Convert every adapter of a catalog, and show how far a run is.

    A run may be stopped or killed at any moment: the same command goes on where it was.
    """


@command.command("run", short_help="Convert every adapter of a catalog.")
@click.argument("catalog", type=options.FOLDER)
@click.option("--out", "-o", type=options.FOLDER, required=True, help="Folder to write to, a folder for each adapter.")
@click.option(
    "--engine",
    type=click.Choice(["serial", "process", "ray"]),
    help="Where adapters are converted. Default: serial, or process with more than one worker.",
)
@click.option("--workers", type=click.IntRange(min=1), metavar="N", help="Processes that convert. Default: 1 or cores.")
@click.option("--ray-address", metavar="ADDRESS", help="A Ray cluster. Default: a Ray of this machine, for this run.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Convert at most N adapters now.")
@click.option("--only", metavar="PATTERN", help="Convert only entries whose output matches, such as 'poems-*'.")
@click.option("--retry-failed", is_flag=True, help="Try failed entries again although nothing changed.")
@click.option("--push-to", metavar="ORG", help="Publish each result on the Hub as ORG/OUTPUT.")
@click.option("--verify", is_flag=True, help="Measure each result against its source, and record the KL divergence.")
@options.as_json
@options.quiet
def run(
    catalog: Path,
    out: Path,
    engine: str | None,
    workers: int | None,
    ray_address: str | None,
    limit: int | None,
    only: str | None,
    retry_failed: bool,
    push_to: str | None,
    verify: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Convert every adapter that CATALOG names (YAML or JSONL, or a folder of adapters) into a folder below OUT.

    OUT/ledger.jsonl says what became of each. What is done is passed over, and a broken adapter fails alone; exits 1
    if any failed.
    """
    if engine == "serial" and (workers or 1) > 1:
        raise click.UsageError("--engine serial has one worker: use --engine process or ray.")
    if ray_address is not None and engine not in (None, "ray"):
        raise click.UsageError("--ray-address goes with --engine ray.")
    from mapconv.commands.catalog import convert_catalog

    try:
        result = convert_catalog(
            catalog,
            out,
            engine=engine,
            workers=workers,
            ray_address=ray_address,
            limit=limit,
            only=only,
            retry_failed=retry_failed,
            push_to=push_to,
            verify=verify,
            quiet=quiet,
        )
    except KeyboardInterrupt:
        say("mapconv: error: interrupted: what is done stays done, run the same command again to go on.")
        sys.exit(130)
    if as_json:
        print_json(result.to_dict())
    else:
        _report(result)
    notes(result.notes)
    if result.failed:
        sys.exit(1)


def _report(result: CatalogResult) -> None:
    rate = f", {result.converted / result.seconds:.2f} a second" if result.converted else ""
    click.echo(f"{result.catalog} → {result.out}: {counted(result.entries, 'adapter')}")
    click.echo(
        f"  {result.done:,} done ({result.converted:,} now, {size(result.nbytes)}), {result.failed:,} failed, "
        f"{result.left:,} left; {result.seconds:.1f} s{rate}"
    )
    for kind in result.by_kind:
        click.echo(f"  {kind.count:,} × {kind.kind}, such as {kind.entry}: {_one_line(kind.error)}")
    if result.failed:
        click.echo("  failed entries are tried again when their files change, or with --retry-failed")


@command.command("status", short_help="Show how far a run is.")
@click.argument("out", type=options.FOLDER)
@click.option("--watch", is_flag=True, help="Show it again each second until the run ends.")
@options.as_json
def status(out: Path, watch: bool, as_json: bool) -> None:
    """Show how far the run in OUT is: counts, time left, failures by kind, the slowest and the least faithful."""
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
    click.echo(f"{found.out} ({state}{f', {found.engine} × {found.workers}' if found.engine else ''})")
    click.echo(f"  [{'█' * filled}{'·' * (width - filled)}] {found.done + found.failed:,} of {total:,}")
    words = [f"{found.done:,} done", f"{found.failed:,} failed", f"{found.left:,} left", size(found.nbytes)]
    if found.per_second:
        words.append(f"{found.per_second:.2f} a second")
    if found.seconds_left is not None:
        words.append(f"{duration(found.seconds_left)} left")
    click.echo(f"  {', '.join(words)}")
    for kind in found.by_kind:
        click.echo(f"  {kind['count']:,} × {kind['kind']}, such as {kind['entry']}: {_one_line(kind['error'])}")
    if found.slowest:
        click.echo()
        print_table(["slowest", "seconds"], [[name, f"{seconds:.1f}"] for name, seconds in found.slowest])
    if found.least_faithful:
        click.echo()
        print_table(
            ["least faithful", "ε worst", "KL"],
            [[name, small(error), "-" if kl is None else small(kl)] for name, error, kl in found.least_faithful],
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
