"""A report that people look at: one HTML file of a MAP adapter or of a catalog run, and a picture for slides."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from mapconv.checkpoint.staging import check_output_file, replace_file
from mapconv.commands.outputs import output_beside
from mapconv.errors import AdapterError, DependencyError
from mapconv.formats.base import Found
from mapconv.formats.mapdir import MapDirectory
from mapconv.formats.peft import CONFIG_FILE
from mapconv.options.commands import REPORT
from mapconv.reporting.adapter_facts import adapter_facts
from mapconv.reporting.adapter_page import adapter_page
from mapconv.reporting.catalog_page import catalog_page
from mapconv.reporting.ledger import LEDGER_FILE, read_ledger


@dataclass(frozen=True)
class ReportResult:
    """What was written. ``items`` counts an adapter's modules or a catalog's entries."""

    path: Path
    kind: Literal["adapter", "catalog"]
    out: Path
    png: Path | None
    items: int
    nbytes: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        png = None if self.png is None else str(self.png)
        return asdict(self) | {"path": str(self.path), "out": str(self.out), "png": png}


@REPORT.checks
def report(
    path: str | Path, out: str | Path | None = None, *, png: str | Path | None = None, force: bool = False
) -> ReportResult:
    """Write the report of what ``mapconv upgrade`` or ``mapconv catalog run`` made.

    Args:
        path: a MAP directory, with its ``verify.json`` where there is one, or a catalog's output folder.
        out: the HTML file; None: ``<path>-report.html`` beside ``path``. It holds all that it shows and needs no
            network; a catalog's links are relative to it.
        png: an adapter's heat maps, or a catalog's distributions, as a picture of 1920 × 1080 pixels.
        force: replace ``out`` and ``png`` if they exist.

    Raises:
        AdapterError: ``path`` is neither, or broken. DataError: a ledger that cannot be read. OutputError: ``out`` or
        ``png`` cannot be written there. DependencyError: a picture without matplotlib.
    """
    started = time.perf_counter()
    path, png = Path(path), None if png is None else Path(png)
    out = Path(f"{output_beside(path, 'report')}.html") if out is None else Path(out)
    check_output_file(out, force=force, suffix=".html")
    if png is not None:
        check_output_file(png, force=force, suffix=".png")
        if find_spec("matplotlib") is None:
            raise DependencyError("a picture needs the package matplotlib: pip install 'mapconv[report]'.")
    kind = _kind(path)
    page, items, slide = (_of_adapter if kind == "adapter" else _of_catalog)(path, out)
    content = page.encode()
    if png is not None:
        replace_file(png, slide())
    replace_file(out, content)
    return ReportResult(path, kind, out, png, items, len(content), time.perf_counter() - started)


def _of_adapter(path: Path, _: Path) -> tuple[str, int, Callable[[], bytes]]:
    """(page, modules, what draws the picture) of a MAP directory."""
    facts = adapter_facts(path)

    def slide() -> bytes:
        # Imported here: only the picture needs matplotlib.
        from mapconv.reporting.slides import adapter_slide

        return adapter_slide(facts)

    return adapter_page(facts), len(facts.modules), slide


def _of_catalog(path: Path, out: Path) -> tuple[str, int, Callable[[], bytes]]:
    """(page, entries, what draws the picture) of a catalog's output; the page's links are relative to ``out``."""
    ledger = read_ledger(path)

    def slide() -> bytes:
        from mapconv.reporting.slides import catalog_slide

        return catalog_slide(ledger)

    return catalog_page(ledger, out), len(ledger.entries), slide


def _kind(path: Path) -> Literal["adapter", "catalog"]:
    if MapDirectory().recognise(Found(path)):
        return "adapter"
    if (path / LEDGER_FILE).is_file():
        return "catalog"
    if (path / CONFIG_FILE).is_file():
        raise AdapterError(f"{path} is not a MAP adapter yet: run `mapconv upgrade {path}` and report its result.")
    raise AdapterError(
        f"{path} is neither a MAP adapter nor a catalog's output: give a folder that `mapconv upgrade` or "
        "`mapconv catalog run` wrote."
    )
