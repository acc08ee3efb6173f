"""What a user sees: results on stdout as tables or JSON, talk on stderr."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from mapconv.checkpoint.filenames import PIPELINE_FILE
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


def show_loading(out: Path, base: Path, *, plain_lora: bool) -> None:
    """What loads a MAP directory: stock PEFT, which knows no pipelines and no single files of image models."""
    if base.suffix == ".safetensors" or (base / PIPELINE_FILE).is_file():
        show(f"  for a program that makes images: mapconv export {out} --to comfyui, kohya or diffusers")
        return
    also = "a plain LoRA" if plain_lora else "a DoRA"
    show(f"  stock PEFT loads it as {also} adapter: PeftModel.from_pretrained(base, {str(out)!r})")


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
