"""A report that people look at: one HTML file of a MAP adapter, a merged model or a catalog run, and a picture."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from mapconv.checkpoint.filenames import MERGE_RECORD
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
from mapconv.reporting.merged_page import merged_facts, merged_page

Kind = Literal["adapter", "merged", "catalog"]


@dataclass(frozen=True)
class ReportResult:
    """What was written. ``items`` counts an adapter's modules, a model's merged tensors or a catalog's entries."""

    path: Path
    kind: Kind
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
    """Write the report of what ``mapconv upgrade``, ``mapconv merge`` or ``mapconv catalog run`` made.

    Args:
        path: a MAP directory, with its ``verify.json`` where there is one, a merged model, or a catalog's output
            folder.
        out: the HTML file; None: ``<path>-report.html`` beside ``path``. It holds all that it shows and needs no
            network; a catalog's links are relative to it.
        png: heat maps of an adapter or a merged model, or a catalog's distributions, as a picture of 1920 × 1080
            pixels.
        force: replace ``out`` and ``png`` if they exist.

    Raises:
        AdapterError: ``path`` is none of these, or broken. DataError: a ledger that cannot be read. OutputError:
        ``out`` or ``png`` cannot be written there. DependencyError: a picture without matplotlib.
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
    page, picture, items = _make(kind, path, out, draw=png is not None)
    content = page.encode()
    if png is not None and picture is not None:
        replace_file(png, picture)
    replace_file(out, content)
    return ReportResult(path, kind, out, png, items, len(content), time.perf_counter() - started)


def _make(kind: Kind, path: Path, out: Path, *, draw: bool) -> tuple[str, bytes | None, int]:
    """(page, picture where one is drawn, how many modules, tensors or entries it is about)."""
    if draw:
        from mapconv.reporting.slides import adapter_slide, catalog_slide, merged_slide
    if kind == "catalog":
        ledger = read_ledger(path)
        return catalog_page(ledger, out), catalog_slide(ledger) if draw else None, len(ledger.entries)
    if kind == "merged":
        merged = merged_facts(path)
        return merged_page(merged), merged_slide(merged) if draw else None, len(merged.tensors)
    adapter = adapter_facts(path)
    return adapter_page(adapter), adapter_slide(adapter) if draw else None, len(adapter.modules)


def _kind(path: Path) -> Kind:
    if MapDirectory().recognise(Found(path)):
        return "adapter"
    if (path / MERGE_RECORD).is_file():
        return "merged"
    if (path / LEDGER_FILE).is_file():
        return "catalog"
    if (path / CONFIG_FILE).is_file():
        raise AdapterError(f"{path} is not a MAP adapter yet: run `mapconv upgrade {path}` and report its result.")
    raise AdapterError(
        f"{path} is not a MAP adapter, a merged model or a catalog's output: give a folder that `mapconv upgrade`, "
        "`mapconv merge` or `mapconv catalog run` wrote."
    )
