"""The coordinating process: what is due goes to an engine, what comes back goes into the ledger."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mapconv.catalog.engines import make_engine
from mapconv.catalog.entries import Entry, Job, told
from mapconv.catalog.faults import stops_the_run
from mapconv.catalog.fingerprints import base_signature, done_fingerprint, failed_fingerprint, source_signatures
from mapconv.catalog.ledger import LEDGER_FILE, Ledger
from mapconv.catalog.lock import run_lock
from mapconv.catalog.pending import Pending, find_pending
from mapconv.checkpoint.staging import replace_file
from mapconv.errors import DiskFullError, OutputError, sentence

#: The run's own folder in OUT: its lock, and what it set out to do.
OWN_FOLDER, LOCK_FILE, RUN_FILE = ".mapconv", "lock", "run.json"


@dataclass
class Tally:
    """How far a run is; what its progress bar shows."""

    due: int
    converted: int = 0
    failed: int = 0
    nbytes: int = 0
    failures: dict[str, tuple[str, str]] = field(default_factory=dict)

    def add(self, entry: str, table: dict[str, Any]) -> None:
        if table["status"] == "done":
            self.converted += 1
            self.nbytes += table.get("nbytes") or 0
        else:
            self.failed += 1
            self.failures[entry] = table["kind"], table["error"]


class Run:
    """One run of some entries into one folder; ``work`` does it, with the folder's lock held."""

    def __init__(self, entries: list[Entry], out: Path, *, engine: str, workers: int, ray_address: str | None) -> None:
        self._entries, self._out = entries, out
        self._engine, self._workers, self._ray_address = engine, workers, ray_address

    def work(
        self,
        watch: Callable[[Tally], Callable[[], None]],
        *,
        catalog: Path,
        total: int,
        retry_failed: bool,
        limit: int | None,
    ) -> tuple[Pending, Tally, int]:
        """Convert what is due; ``watch`` is told what the run is going to count, and returns what to call after each;
        ``total`` counts the catalog's entries, of which this run may have only some.

        Returns what was found at the start, what became of it, and how many lines of the ledger could not be read.
        """
        own = prepare_output(self._out)
        with run_lock(own / LOCK_FILE) as lock, Ledger(self._out / LEDGER_FILE) as ledger:
            base_signature.cache_clear()
            pending = find_pending(self._entries, ledger.seen, self._out, retry_failed=retry_failed, limit=limit)
            tally = Tally(len(pending.due))
            if pending.due:
                self._write_facts(own / RUN_FILE, catalog, total, len(pending.due))
            advance = watch(tally)
            if pending.due:
                engine = make_engine(
                    self._engine,
                    workers=min(self._workers, len(pending.due)),
                    ray_address=self._ray_address,
                    lock=lock,
                )
                self._convert(engine, pending.due, ledger, tally, advance)
            return pending, tally, ledger.broken

    def _convert(
        self, engine: Any, due: list[Entry], ledger: Ledger, tally: Tally, advance: Callable[[], None]
    ) -> None:
        given: dict[str, tuple[Entry, tuple[str, ...]]] = {}
        with closing(engine.run(self._jobs(due, given))) as batches:
            for batch in batches:
                lines = []
                for job, outcome in batch:
                    if outcome.stop:
                        continue
                    entry, stats = given.pop(job.entry)
                    lines.append(_line(entry, stats, outcome.table))
                    tally.add(entry.name, outcome.table)
                try:
                    ledger.append(lines)
                except OSError as error:
                    if not stops_the_run(error):
                        raise
                    raise _stopped(sentence(error), tally) from None
                advance()
                for _, outcome in batch:
                    if outcome.stop:
                        raise _stopped(outcome.table["error"], tally)

    def _jobs(self, due: Iterable[Entry], given: dict[str, tuple[Entry, tuple[str, ...]]]) -> Iterator[Job]:
        """One job after another, as the engine takes them; signatures are taken before the sources' files are read."""
        out = self._out.resolve()
        for entry in due:
            given[entry.name] = entry, source_signatures(entry)
            yield Job(
                entry=entry.name,
                sources=entry.sources,
                base=entry.base,
                output=str(out / entry.name),
                merged=str(out / entry.merged) if entry.merged else None,
                stages=entry.options.stages,
            )

    def _write_facts(self, path: Path, catalog: Path, total: int, due: int) -> None:
        """What ``mapconv catalog status`` cannot see in the ledger."""
        facts = {
            "catalog": str(catalog),
            "entries": total,
            "due": due,
            "engine": self._engine,
            "workers": self._workers,
            "started": datetime.now(timezone.utc).isoformat(),
        }
        replace_file(path, (json.dumps(facts, indent=2) + "\n").encode())


def prepare_output(out: Path) -> Path:
    """Make the output folder and the run's own folder in it; returns the latter.

    Raises:
        OutputError: the folder holds something that no run made, or cannot be written to.
    """
    own = out / OWN_FOLDER
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is not a folder: choose another output folder.")
    if out.is_dir() and not own.is_dir() and not (out / LEDGER_FILE).exists() and any(out.iterdir()):
        raise OutputError(f"{out} holds files, but no {LEDGER_FILE}: no run made it, so choose another output folder.")
    own.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK | os.X_OK) or not os.access(own, os.W_OK | os.X_OK):
        raise OutputError(f"no permission to write in {out}: choose another output folder.")
    return own


def _line(entry: Entry, stats: tuple[str, ...], table: dict[str, Any]) -> dict[str, Any]:
    done = table["status"] == "done"
    fingerprint = done_fingerprint(entry, table["content"], table["base"]) if done else failed_fingerprint(entry, stats)
    found = {"content": told(table["content"])} if done else {}
    return {
        "entry": entry.name,
        "fingerprint": fingerprint,
        "source": told(entry.sources),
        "base": entry.base,
        "output": entry.name if done else None,
        "merged": entry.merged if done else None,
        "stat": told(stats),
    } | (table | found)


def _stopped(reason: str, tally: Tally) -> DiskFullError:
    left = tally.due - tally.converted - tally.failed
    return DiskFullError(
        f"{reason.rstrip('.')}; the run stopped with {left:,} entries left: run the same command again to continue."
    )


def first_by_kind(failures: dict[str, tuple[str, str]]) -> list[tuple[str, int, str, str]]:
    """(kind, count, first entry, its sentence) of each kind of error, the most frequent first."""
    counts = Counter(kind for kind, _ in failures.values())
    firsts: dict[str, tuple[str, str]] = {}
    for entry, (kind, error) in failures.items():
        firsts.setdefault(kind, (entry, error))
    return [(kind, count, *firsts[kind]) for kind, count in counts.most_common()]
