"""Which entries are due: by what the ledger says, by what is on the disk, and by what was asked for."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mapconv.catalog.entries import Entry
from mapconv.catalog.fingerprints import done_fingerprint, failed_fingerprint, source_signatures
from mapconv.catalog.ledger import Seen
from mapconv.errors import CatalogError
from mapconv.jsonfile import read_object


@dataclass
class Pending:
    """The entries that are due, grouped by base, and what is known of the others."""

    due: list[Entry] = field(default_factory=list)
    done: int = 0
    failed: dict[str, Seen] = field(default_factory=dict)


def find_pending(
    entries: Iterable[Entry], seen: dict[str, Seen], out: Path, *, retry_failed: bool, limit: int | None
) -> Pending:
    """Sort entries into done, failed before and due; no file's content is read unless its stat signature changed."""
    found = Pending()
    for entry in entries:
        line = seen.get(entry.name)
        if line is not None and line.done and _is_done(entry, line, out):
            found.done += 1
        elif line is not None and not line.done and not retry_failed and _failed_so(entry, line):
            found.failed[entry.name] = line
        else:
            found.due.append(entry)
    found.due = _grouped(found.due)[:limit]
    return found


def _is_done(entry: Entry, line: Seen, out: Path) -> bool:
    """Whether the ledger's output is there and still what this entry asks for."""
    if not line.contents or done_fingerprint(entry, line.contents, line.base) != line.fingerprint:
        return False
    folder = f"{out}/{entry.name}"
    if not os.path.exists(f"{folder}/map_config.json"):
        return False
    if entry.merged and not os.path.exists(f"{out}/{entry.merged}/map_merge.json"):
        return False
    return source_signatures(entry) == line.stats or _have_contents(entry.sources, line.contents)


def _failed_so(entry: Entry, line: Seen) -> bool:
    """Whether an attempt now would meet the same sources, base and options as the one that failed."""
    return failed_fingerprint(entry, source_signatures(entry)) == line.fingerprint


def _have_contents(sources: Sequence[str], contents: Sequence[str]) -> bool:
    from mapconv.metadata.provenance import source_fingerprint

    try:
        return [source_fingerprint(Path(source)) for source in sources] == list(contents)
    except OSError:
        return False


def _grouped(entries: list[Entry]) -> list[Entry]:
    """In the catalog's order, but those of one base together: a worker keeps its base's headers and norms at hand."""
    bases = [entry.base or _recorded_base(entry.sources[0]) for entry in entries]
    first = {base: -position for position, base in reversed(list(enumerate(bases)))}
    if len(Counter(bases)) < 2:
        return entries
    order = sorted(range(len(entries)), key=lambda position: (-first[bases[position]], position))
    return [entries[position] for position in order]


def _recorded_base(source: str) -> str | None:
    """What the adapter's configuration names, or None; its conversion says what is wrong."""
    try:
        name = read_object(Path(source, "adapter_config.json"), CatalogError).get("base_model_name_or_path")
    except (OSError, ValueError, CatalogError):
        return None
    return name if isinstance(name, str) else None
