"""How far a run is, from its ledger: read as a stream, without torch."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mapconv.catalog.ledger import LEDGER_FILE, read_lines
from mapconv.catalog.lock import is_locked
from mapconv.catalog.run import LOCK_FILE, OWN_FOLDER, RUN_FILE, first_by_kind
from mapconv.errors import CatalogError
from mapconv.jsonfile import read_object
from mapconv.untrusted.schema import COUNT, TEXT

#: How many of the slowest and of the least faithful entries are shown.
SHOWN = 5


@dataclass(frozen=True)
class Status:
    """How far a run is. ``entries`` is None where no run has recorded how many there are.

    ``slowest`` are (entry, seconds), ``least_faithful`` (entry, worst ε, KL or None). ``per_second`` counts what the
    present or last run finished; ``seconds_left`` is None unless one is going on.
    """

    out: Path
    running: bool
    engine: str | None
    workers: int | None
    entries: int | None
    done: int
    failed: int
    nbytes: int
    per_second: float | None
    seconds_left: float | None
    by_kind: tuple[dict[str, Any], ...]
    slowest: tuple[tuple[str, float], ...]
    least_faithful: tuple[tuple[str, float, float | None], ...]
    notes: tuple[str, ...] = ()

    @property
    def left(self) -> int:
        return max(0, (self.entries or 0) - self.done - self.failed)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"out": str(self.out), "left": self.left}


def read_status(out: Path) -> Status:
    """Read the ledger of the run in ``out``.

    Raises:
        CatalogError: there is none, or it is of another version.
    """
    path = out / LEDGER_FILE
    if not path.is_file():
        raise CatalogError(f"{out} has no {LEDGER_FILE}: give the output folder of `mapconv catalog run`.")
    last: dict[str, tuple] = {}
    broken = 0
    for line in read_lines(path):
        broken += line is None
        if line is not None:
            last[line["entry"]] = _kept(line)
    done = {name: kept for name, kept in last.items() if kept[0] == "done"}
    failures = {name: (kept[1] or "unknown", kept[2] or "") for name, kept in last.items() if kept[0] == "failed"}
    facts = _facts(out / OWN_FOLDER / RUN_FILE)
    running = is_locked(out / OWN_FOLDER / LOCK_FILE)
    entries, started = facts.get("entries"), _time(facts.get("started"))
    rate = _rate([_time(kept[7]) for kept in last.values()], started, running)
    left = max(0, (entries or 0) - len(last))
    errors = [(name, kept[4], kept[5]) for name, kept in done.items() if kept[4] is not None]
    return Status(
        out=out,
        running=running,
        engine=facts.get("engine"),
        workers=facts.get("workers"),
        entries=entries,
        done=len(done),
        failed=len(failures),
        nbytes=sum(kept[6] or 0 for kept in done.values()),
        per_second=rate,
        seconds_left=left / rate if running and rate else None,
        by_kind=tuple(
            dict(zip(("kind", "count", "entry", "error"), item, strict=True)) for item in first_by_kind(failures)
        ),
        slowest=tuple(_largest(((name, kept[3]) for name, kept in last.items() if kept[3] is not None))),
        least_faithful=tuple(_largest(item for item in errors if item[1] > 0)),
        notes=(f"{broken} lines of the ledger cannot be read and were skipped",) if broken else (),
    )


def _kept(line: dict[str, Any]) -> tuple:
    names = ("status", "kind", "error", "seconds", "worst_error", "kl", "nbytes", "finished")
    return tuple(line.get(name) for name in names)


def _largest(items: Iterable[tuple]) -> list[tuple]:
    return heapq.nlargest(SHOWN, items, key=lambda item: item[1])


def _rate(finished: list[datetime | None], started: datetime | None, running: bool) -> float | None:
    """Entries a second of the present or last run; None where the clock makes no sense of it."""
    if started is None:
        return None
    times = [time for time in finished if time is not None and time >= started]
    if not times:
        return None
    until = datetime.now(timezone.utc) if running else max(times)
    seconds = (until - started).total_seconds()
    return len(times) / seconds if seconds > 0 else None


def _time(text: Any) -> datetime | None:
    try:
        time = datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return None
    return time if time.tzinfo is not None else None


def _facts(path: Path) -> dict[str, Any]:
    """What the run set out to do; nothing where that was not recorded."""
    try:
        table = read_object(path, CatalogError)
    except (OSError, CatalogError):
        return {}
    kinds = {"entries": COUNT, "due": COUNT, "engine": TEXT, "workers": COUNT, "started": TEXT}
    return {name: table[name] for name, kind in kinds.items() if kind.holds(table.get(name))}
