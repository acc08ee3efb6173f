"""The second or two in which torch is imported: files are read ahead, and the user sees that something is happening."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import click

from mapconv.checkpoint.readahead import read_ahead


@contextmanager
def starting(
    adapters: Sequence[str | Path], base: str | Path | None, *, whole_base: bool = False, quiet: bool = False
) -> Iterator[None]:
    """Hold the imports of a command's work: meanwhile its files are read ahead, and a terminal shows a line."""
    if "torch" in sys.modules:
        yield
        return
    read_ahead(adapters, base, whole_base=whole_base)
    shown = not quiet and sys.stderr.isatty()
    if shown:
        click.echo("loading torch, reading the files ahead …", err=True, nl=False)
    try:
        yield
    finally:
        if shown:
            click.echo("\r\x1b[K", err=True, nl=False)
