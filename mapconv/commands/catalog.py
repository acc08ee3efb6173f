"""Convert every adapter of a catalog; a run that was stopped goes on where it was."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from mapconv.catalog.claims import check_repositories
from mapconv.catalog.entries import Entry
from mapconv.catalog.reading import read_catalog
from mapconv.catalog.run import Run, Tally, first_by_kind
from mapconv.errors import CatalogError
from mapconv.options.commands import CATALOG_RUN
from mapconv.runtime.cores import core_count
from mapconv.runtime.progress import tally_bar


@dataclass(frozen=True)
class Failure:
    """An entry that failed, in this run or before; ``kind`` is the error's class."""

    entry: str
    kind: str
    error: str


@dataclass(frozen=True)
class FailureKind:
    """All failures of one kind, with the first of them."""

    kind: str
    count: int
    entry: str
    error: str


@dataclass(frozen=True)
class CatalogResult:
    """What a run did. ``done`` counts all entries that have their output now, ``converted`` those of this run.

    ``failures`` are those that have none: of this run, and of earlier ones whose cause has not changed.
    ``nbytes`` is what this run wrote.
    """

    out: Path
    catalog: Path
    engine: str
    workers: int
    entries: int
    done: int
    converted: int
    failures: tuple[Failure, ...]
    nbytes: int
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def failed(self) -> int:
        return len(self.failures)

    @property
    def left(self) -> int:
        """Entries that are due and were not reached (``limit``)."""
        return self.entries - self.done - self.failed

    @property
    def by_kind(self) -> tuple[FailureKind, ...]:
        found = first_by_kind({failure.entry: (failure.kind, failure.error) for failure in self.failures})
        return tuple(FailureKind(*item) for item in found)

    def to_dict(self) -> dict[str, Any]:
        table = asdict(self) | {"out": str(self.out), "catalog": str(self.catalog)}
        kinds = [asdict(kind) for kind in self.by_kind]
        return table | {"failed": self.failed, "left": self.left, "by_kind": kinds}


@CATALOG_RUN.checks
def convert_catalog(
    catalog: str | Path,
    out: str | Path,
    *,
    engine: Literal["serial", "process", "ray"] | None = None,
    workers: int | None = None,
    ray_address: str | None = None,
    limit: int | None = None,
    only: str | None = None,
    retry_failed: bool = False,
    push_to: str | None = None,
    verify: bool = False,
    quiet: bool = True,
) -> CatalogResult:
    """Convert every adapter that a catalog names into a folder of its own below ``out``.

    What ``out/ledger.jsonl`` says is done, and is still what the catalog asks for, is passed over; an entry that
    failed is tried again when its source, its base or its options changed. A broken adapter fails alone.

    Args:
        catalog: a YAML or JSONL file (``mapconv.catalog.reading``), or a folder of adapters.
        out: the folder to write to; one run at a time.
        engine: ``serial``, ``process`` or ``ray``; None: processes if there is more than one worker.
        workers: processes that convert; None: one with ``serial``, else one for each core.
        ray_address: of a Ray cluster (``auto``, ``ray://host:port``); None starts Ray on this machine.
        limit: convert at most this many entries now.
        only: convert only entries whose output matches this pattern (``poems-*``).
        retry_failed: try failed entries again although nothing changed.
        push_to: publish each result as ``push_to/<output>``, with the catalog's options for ``push``.
        verify: run ``verify`` on each result and record its KL divergence.
        quiet: no progress bar.

    Raises:
        CatalogError: a fault in the catalog; nothing was converted. OutputError: ``out`` cannot be used, or is full.
        ValueError: an option out of its range, or options that cannot be used together.
    """
    started = time.perf_counter()
    catalog, out = Path(catalog), Path(out)
    if engine is None:
        engine = (
            "serial" if ray_address is None and (workers or 1) == 1 else "process" if ray_address is None else "ray"
        )
    workers = workers or (1 if engine == "serial" else core_count())
    catalogued = read_catalog(catalog)
    if verify or push_to is not None:
        catalogued = _with_stages(catalogued, verify=verify, push_to=push_to)
        check_repositories(catalogued, catalog)
    entries = [entry for entry in catalogued if only is None or fnmatchcase(entry.name, only)]
    if not entries:
        raise CatalogError(f"{catalog} has no entry that matches {only!r}: nothing was converted.")
    run = Run(entries, out, engine=engine, workers=workers, ray_address=ray_address)
    with tally_bar("converting", unit="adapter", quiet=quiet) as bar:

        def watch(tally: Tally):
            return bar(tally.due, lambda: (tally.converted + tally.failed, {"failed": tally.failed}))

        pending, tally, broken = run.work(
            watch, catalog=catalog, total=len(catalogued), retry_failed=retry_failed, limit=limit
        )
    notes = [f"{broken} lines of the ledger cannot be read and were skipped"] if broken else []
    failures = [Failure(name, seen.kind or "unknown", seen.error or "") for name, seen in pending.failed.items()]
    failures += [Failure(name, kind, error) for name, (kind, error) in tally.failures.items()]
    return CatalogResult(
        out=out,
        catalog=catalog,
        engine=engine,
        workers=workers,
        entries=len(entries),
        done=pending.done + tally.converted,
        converted=tally.converted,
        failures=tuple(failures),
        nbytes=tally.nbytes,
        seconds=time.perf_counter() - started,
        notes=tuple(notes),
    )


def _with_stages(entries: list[Entry], *, verify: bool, push_to: str | None) -> list[Entry]:
    """Entries with the stages that the caller asks for besides; the catalog's own options for them count."""
    changed: list[Entry] = []
    shared: dict[str, Any] = {}
    for entry in entries:
        options = entry.options
        if verify:
            options = shared.setdefault(options.digest, options.with_stage("verify", {}))
        if push_to is not None:
            options = options.with_stage("push", {"repo_id": f"{push_to}/{entry.name.replace('/', '-')}"})
        changed.append(entry.with_options(options))
    return changed
