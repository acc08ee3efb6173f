"""What a catalog says of one result, and the job that an engine makes of it: paths, names and options, no tensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

#: What takes the place of ``upgrade``, which an entry does where it names none of these.
INSTEAD = ("rebase", "extract", "combine")
#: What an entry may ask for, in the order in which it is done.
STAGES = ("upgrade", *INSTEAD, "calibrate", "verify", "merge", "push")


class Options:
    """The options of one entry, by stage. Entries with the same options share one object, so that a long catalog
    stays small.

    ``digest`` names the content.
    """

    __slots__ = ("digest", "stages")

    def __init__(self, stages: Mapping[str, Mapping[str, Any]]) -> None:
        self.stages = stages
        text = json.dumps(stages, sort_keys=True, default=str)
        self.digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()

    def with_stage(self, name: str, options: Mapping[str, Any]) -> Options:
        """These options and those of a stage that the command line asks for; what the catalog says of it stays."""
        return Options(dict(self.stages) | {name: {**options, **self.stages.get(name, {})}})


@dataclass(frozen=True, slots=True)
class Entry:
    """One result of a catalog, and what it is made from: one source, or with ``combine`` several.

    ``name`` is its folder relative to OUT.
    """

    name: str
    sources: tuple[str, ...]
    base: str | None
    options: Options
    line: int | None = None

    @property
    def merged(self) -> str | None:
        """The folder of the merged model relative to OUT, if the entry asks for one."""
        return f"{self.name}-merged" if "merge" in self.options.stages else None

    def with_options(self, options: Options) -> Entry:
        return replace(self, options=options)


@dataclass(frozen=True)
class Job:
    """What a worker is told: it can be sent to another process or machine as JSON."""

    entry: str
    sources: Sequence[str]
    base: str | None
    output: str
    merged: str | None
    stages: Mapping[str, Mapping[str, Any]]

    @property
    def command(self) -> str:
        """What makes the result: ``upgrade``, or what the entry has instead."""
        return next((stage for stage in INSTEAD if stage in self.stages), "upgrade")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def told(values: Sequence[str]) -> str | list[str]:
    """What a ledger has of the sources: of one the value itself, of several a list."""
    return values[0] if len(values) == 1 else list(values)
