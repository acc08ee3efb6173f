"""What a user sees: results on stdout as tables or JSON, talk on stderr."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import click

from mapconv.jsonfile import finite
from mapconv.untrusted.printable import printable, printable_message


def show(line: str = "", colour: str | None = None) -> None:
    """A line of the result; whatever names it holds, it stays one line."""
    click.echo(printable(line) if colour is None else coloured(printable(line), colour))


#: What the symbols say, in lines for 80 columns: shown before a table that has them.
SCALARS = (
    "α scales the base weight W0 and β its update Δ: α/‖W0‖ = 1 leaves the base as",
    "it is, and β/α is the size of the update beside it.",
)
EPSILON = (
    "ε is the error as a share of the update: 0 is exact, 1 is as far off as no",
    "adapter at all.",
)


def explain(*symbols: Sequence[str]) -> None:
    for line in (line for lines in symbols for line in lines):
        show(f"  {line}")
    show()


def coloured(text: str, colour: str, *, err: bool = False) -> str:
    """The text in a colour where a terminal shows it and NO_COLOR does not forbid it (no-color.org)."""
    stream = sys.stderr if err else sys.stdout
    if os.environ.get("NO_COLOR") or stream is None or not stream.isatty():
        return text
    return click.style(text, fg=colour)


def talk(*, verbose: bool) -> None:
    """With ``verbose``, what the commands log goes to stderr, each line with the seconds since the start."""
    log = logging.getLogger("mapconv")
    log.setLevel(logging.INFO if verbose else logging.WARNING)
    if verbose and not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(relativeCreated)8.0f ms  %(message)s"))
        log.addHandler(handler)


def say(message: str = "") -> None:
    """A line for the user that is not data, with indented details where it has any."""
    click.echo(printable_message(message), err=True)


def notes(lines: Iterable[str]) -> None:
    for line in lines:
        say(f"note: {line}")


def print_json(table: dict[str, Any]) -> None:
    """Strict JSON: a number that is not finite becomes null, for readers that know no NaN."""
    click.echo(json.dumps(finite(table), indent=2, default=str, allow_nan=False))


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as they need; the first is flush left, the others flush right.

    Where a terminal is too narrow, each row becomes a block of lines, a column a line: nothing breaks inside a row.
    """
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    if sum(widths) + 2 * len(widths) > _columns():
        label = max(map(len, head))
        for row in rows:
            show(f"  {row[0]}")
            for name, cell in zip(head[1:], row[1:], strict=True):
                show(f"    {name.ljust(label)}  {cell}")
        return
    for row in [head, ["─" * width for width in widths], *rows]:
        cells = [row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        show("  " + "  ".join(cells).rstrip())


def _columns() -> int:
    """The width of the terminal that watches; a file or a pipe takes any."""
    if sys.stdout is None or not sys.stdout.isatty():
        return sys.maxsize
    return shutil.get_terminal_size().columns


def size(nbytes: float) -> str:
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


def small(value: float | None) -> str:
    """A number near zero: ``0``, ``0.0123`` or ``1.2e-08``; ``-`` where there is none."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    return f"{value:.4f}" if abs(value) >= 0.001 else f"{value:.1e}"


def percent(share: float) -> str:
    """``54 %``, ``0.4 %``, ``0 %``, ``2e-05 %``."""
    value = 100 * share
    return f"{value:.0f} %" if value >= 10 or value == 0 else f"{value:.2g} %"


def roughly(seconds: float) -> str:
    """An estimate, with no more digits than it deserves: ``5 s``, ``2 min``, ``3 h``."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 1.5 * length:
            return f"{_coarse(seconds / length)} {unit}"
    return f"{_coarse(max(1.0, seconds))} s"


def _coarse(value: float) -> int:
    """To one digit: 1, 2, … 9, 10, 20."""
    magnitude = 10 ** max(0, math.floor(math.log10(value)))
    return round(value / magnitude) * magnitude
