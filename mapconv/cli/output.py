"""What a user sees: results on stdout as tables or JSON, talk on stderr."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import click

from mapconv.jsonfile import finite
from mapconv.untrusted.printable import printable, printable_message


def show(line: str = "") -> None:
    """A line of the result; whatever names it holds, it stays one line."""
    click.echo(printable(line))


def talk(*, verbose: bool) -> None:
    """With ``verbose``, what the commands log goes to stderr, each line with the seconds since the start."""
    log = logging.getLogger("mapconv")
    log.setLevel(logging.INFO if verbose else logging.WARNING)
    if verbose and not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(relativeCreated)8.0f ms  %(message)s"))
        log.addHandler(handler)


def say(message: str = "") -> None:
    """A line for the user that is no data, with indented details where it has any."""
    click.echo(printable_message(message), err=True)


def notes(lines: Iterable[str]) -> None:
    for line in lines:
        say(f"note: {line}")


def print_json(table: dict[str, Any]) -> None:
    """Strict JSON: a number that is not finite becomes null, for readers that know no NaN."""
    click.echo(json.dumps(finite(table), indent=2, default=str, allow_nan=False))


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as they need; the first is flush left, the others flush right."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    for row in [head, ["─" * width for width in widths], *rows]:
        cells = [row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        show("  " + "  ".join(cells).rstrip())


def size(nbytes: int) -> str:
    """1,234,567 → ``1.2 MB``."""
    value, unit = float(nbytes), "B"
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"


def spread(values: Sequence[float], digits: int = 4) -> str:
    """``1.0012`` where all agree to the digits shown, else ``0.9981 … 1.0144``."""
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low} … {high}"


def small(value: float) -> str:
    """A number near zero: ``0``, ``0.0123`` or ``1.2e-08``."""
    if value == 0:
        return "0"
    return f"{value:.4f}" if abs(value) >= 0.001 else f"{value:.1e}"
