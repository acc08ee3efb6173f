"""Each entry has folders and a repository of its own: an output replaces its folder as a whole."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mapconv.catalog.entries import Entry
from mapconv.catalog.records import Faults

_OTHER = "give this entry another with `output`"


class Claims:
    """What the entries so far have taken; each claim answers what is wrong with it, or None."""

    def __init__(self) -> None:
        self._folders: dict[str, int] = {}
        self._holders: dict[str, str] = {}
        self._repositories: dict[str, int] = {}

    def folder(self, name: str, line: int) -> str | None:
        """Claim a folder relative to OUT, which may neither be, nor lie in, nor hold another's."""
        if name in self._folders:
            return f"the output {name!r} is taken by line {self._folders[name]}: {_OTHER}"
        parents = [name[:place] for place, character in enumerate(name) if character == "/"]
        self._folders[name] = line
        for parent in parents:
            self._holders.setdefault(parent, name)
        outer = next((parent for parent in parents if parent in self._folders), None)
        if outer is not None:
            return f"the output {name!r} lies in {outer!r}, that of line {self._folders[outer]}: {_OTHER}"
        inner = self._holders.get(name)
        if inner is not None:
            return f"the output {name!r} holds {inner!r}, that of line {self._folders[inner]}: {_OTHER}"
        return None

    def repository(self, name: str, line: int) -> str | None:
        key = repository_key(name)
        if key in self._repositories:
            return f"the repository {name} is taken by line {self._repositories[key]}: {_OTHER}"
        self._repositories[key] = line
        return None


def repository_key(name: str) -> str:
    """The Hub tells no repositories apart by capitals."""
    return name.lower()


def check_repositories(entries: Iterable[Entry], catalog: Path) -> None:
    """Refuse entries that would be pushed over one another.

    Raises:
        CatalogError: with all of them.
    """
    faults, owners = Faults(catalog), {}
    for entry in entries:
        name = entry.options.stages.get("push", {}).get("repo_id")
        if name is None:
            continue
        first = owners.setdefault(repository_key(name), entry)
        if first is not entry:
            faults.add(entry.line, f"{first.name!r} and {entry.name!r} would both be pushed to {name}: {_OTHER}")
    faults.check()
