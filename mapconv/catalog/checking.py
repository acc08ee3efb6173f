"""The catalog file's view of the option records: check entries against them, before anything is converted."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from mapconv.catalog.claims import Claims
from mapconv.catalog.entries import INSTEAD, STAGES, Entry, Options
from mapconv.catalog.records import Faults, Record
from mapconv.options.commands import COMMANDS
from mapconv.options.kinds import File, Folder, Repository, Source
from mapconv.options.records import Option

#: Options that come later: from the command line (``--push-to``), and the folder that a run merges into.
_GIVEN_LATER = {("push", "repo_id"), ("merge", "out")}
#: Stages that need one adapter as the source, by what has none, and why.
_APART = {
    "rebase": {"calibrate": "give calibrate as an option below rebase"},
    "extract": {"calibrate": "there is no adapter to go by"},
    "combine": {"calibrate": "there is no one adapter to go by"},
}
_KEYS = ("source", "base", "output", *STAGES)
_KEY_SET = frozenset(_KEYS)


class Checker:
    """Turns records into entries; what is wrong with one is added to ``faults``."""

    def __init__(self, folder: Path, faults: Faults) -> None:
        self._folder, self._faults = folder, faults
        self._defaults: dict[str, Any] = {"upgrade": {}}
        self._claims = Claims()
        self._interned: dict[str, Options] = {}
        self._checked: dict[tuple[str, int], list[tuple[str, str, str]]] = {}
        #: (stage, option) of the values that were refused: of the defaults, and with them of the entry at hand.
        self._unread_defaults: set[tuple[str, str]] = set()
        self._unread: set[tuple[str, str]] = set()
        self._plain = self._merged({})

    def set_defaults(self, record: Record) -> None:
        if not isinstance(record.table, dict):
            self._faults.add(record.line, "defaults must be a table")
            return
        for key in ("source", "output"):
            if key in record.table:
                self._faults.add(record.line_of(key), f"{key} belongs to an entry, not to defaults")
        self._known_keys(record)
        self._defaults |= {"base": self._base(record)} | self._stages(record)
        self._unread_defaults = self._unread
        self._plain = self._merged({})

    def entry(self, record: Record) -> Entry | None:
        """The entry, or None if it is broken."""
        if not isinstance(record.table, dict):
            self._faults.add(record.line, f"expected a table with a source, found {_shown(record.table)}")
            return None
        self._known_keys(record)
        sources = self._sources(record)
        if sources is None:
            return None
        base = self._base(record) if "base" in record.table else self._defaults.get("base")
        self._unread = set(self._unread_defaults)
        own = self._stages(record)
        options = self._merged(own) if own else self._plain
        name = self._name(record, sources)
        if name is None:
            return None
        self._check(record, options, sources)
        if base is None and "extract" in options.stages:
            self._faults.add(
                record.line_of("extract"), "extract needs a base: the model that source was finetuned from"
            )
        entry = Entry(name, tuple(map(self._resolved, sources)), base, options, record.line)
        for folder in (name, entry.merged):
            self._claim(record.line_of("output"), folder, self._claims.folder)
        repository = options.stages.get("push", {}).get("repo_id")
        self._claim(record.line_of("push", "repo_id"), repository, self._claims.repository)
        return entry

    def _known_keys(self, record: Record) -> None:
        for key in record.table.keys() - _KEY_SET:
            stage = next((stage for stage in STAGES if _takes(stage, key)), None)
            hint = f": an option of {stage} belongs below {stage}" if stage else f", expected {', '.join(_KEYS)}"
            self._faults.add(record.line_of(key), f"unknown key {key!r}{hint}")

    def _sources(self, record: Record) -> tuple[str, ...] | None:
        """What the entry names; None if that is no name."""
        source = record.table.get("source")
        named = source if isinstance(source, list) else [source]
        if named and all(map(_is_name, named)):
            return tuple(named)
        found = "source is missing" if "source" not in record.table else f"source is {_shown(source)}"
        self._faults.add(record.line_of("source"), f"{found}: name an adapter's folder or Hub reference")
        return None

    def _base(self, record: Record) -> str | None:
        base = record.table.get("base")
        if base is not None and not _is_name(base):
            self._faults.add(record.line_of("base"), f"base is {_shown(base)}: name a model's folder or Hub id")
            return None
        return None if base is None else self._resolved(base)

    def _stages(self, record: Record) -> dict[str, dict[str, Any] | None]:
        """The options of the stages that the record names; None for one that it switches off."""
        stages: dict[str, dict[str, Any] | None] = {}
        for stage in STAGES:
            value = record.table.get(stage, ...)
            if value is ...:
                continue
            if isinstance(value, bool) and (value or stage != "upgrade"):
                stages[stage] = {} if value else None
            elif isinstance(value, dict):
                stages[stage] = self._options(stage, value, record)
            else:
                self._faults.add(record.line_of(stage), f"{stage} is {_shown(value)}: expected a table of its options")
        return stages

    def _options(self, stage: str, table: Mapping[str, Any], record: Record) -> dict[str, Any]:
        known, checked = COMMANDS[stage].options, {}
        for name, value in table.items():
            line, option = record.line_of(stage, name), known.get(name)
            if not _takes(stage, name):
                reason = option.refusal if option and option.in_python else f"mapconv {stage} has no such option"
                self._faults.add(line, f"{stage}: unknown option {name!r}: {reason}")
                continue
            try:
                assert option is not None  # a name that the command takes
                checked[name] = self._value(option, value)
            except ValueError as error:
                self._faults.add(line, f"{stage}: {name} is {_shown(value)}: expected {error}")
                self._unread.add((stage, name))
        return checked

    def _value(self, option: Option, value: Any) -> Any:
        """The value as the function takes it, with what can be known of it before the run.

        Raises:
            ValueError: with what was expected.
        """
        value = option.read(value)
        if value is None or not isinstance(option.kind, File | Folder | Repository | Source):
            return value
        if isinstance(option.kind, Repository):
            if len(value.split("/")) != 2 or not all(value.split("/")):
                raise ValueError(option.kind.expected)
            return value
        path = self._resolved(value)
        if isinstance(option.kind, File) and option.kind.exists and not os.path.exists(path):
            raise ValueError("a file, and there is none of that name")
        return path

    def _check(self, record: Record, options: Options, sources: tuple[str, ...]) -> None:
        """Name the options that a stage lacks, and those that cannot stand together, wherever each was given."""
        if len(sources) > 1 and "combine" not in options.stages:
            self._faults.add(
                record.line_of("source"), f"source names {len(sources)} adapters, which combine alone takes: add it"
            )
        key = options.digest, len(sources)
        found = None if self._unread else self._checked.get(key)
        if found is None:
            found = list(_faults(options, sources, self._unread))
        if not self._unread:  # entries mostly share their options
            self._checked[key] = found
        for stage, name, fault in found:
            self._faults.add(record.line_of(stage, name), f"{stage}: {fault}")

    def _name(self, record: Record, sources: tuple[str, ...]) -> str | None:
        name, line = record.table.get("output"), record.line_of("output")
        if name is None:
            name = _last_name(sources[0]) + "-combined" * (len(sources) > 1)
        fault = output_fault(name)
        if fault:
            self._faults.add(line, f"output {_shown(name)} {fault}")
        return None if fault else name

    def _claim(self, line: int, name: str | None, claim: Callable[[str, int], str | None]) -> None:
        if name is not None and (fault := claim(name, line)):
            self._faults.add(line, fault)

    def _resolved(self, name: str) -> str:
        """A path from the catalog's folder where that exists, else as it is: a Hub reference, or a path from here."""
        path = os.path.join(self._folder, os.path.expanduser(name))
        return os.path.abspath(path) if os.path.exists(path) else name

    def _merged(self, own: Mapping[str, dict[str, Any] | None]) -> Options:
        """The defaults, with an entry's own options over them. What an entry does in place of ``upgrade`` takes the
        place of whatever the defaults would have it do."""
        defaults = self._defaults
        if any(own.get(name) is not None for name in INSTEAD):
            defaults = defaults | {"upgrade": {}} | dict.fromkeys(set(INSTEAD) - own.keys())
        stages = {name: own.get(name, defaults.get(name)) for name in STAGES}
        options = Options({n: (defaults.get(n) or {}) | v for n, v in stages.items() if v is not None})
        return self._interned.setdefault(options.digest, options)


def _faults(
    options: Options, sources: tuple[str, ...], unread: Collection[tuple[str, str]]
) -> Iterator[tuple[str, str, str]]:
    """(stage, option, what is wrong) of options that are each in order; ``unread`` were refused before."""
    instead = [stage for stage in INSTEAD if stage in options.stages]
    for stage in instead[:1]:
        for name in options.stages["upgrade"]:
            yield "upgrade", name, f"an entry has {stage} in place of upgrade: give its options below {stage}"
        for other, why in _APART[stage].items():
            if other in options.stages:
                yield other, other, f"{other} does not go with {stage}: {why}"
    for stage in instead[1:]:
        yield stage, stage, f"an entry has either {instead[0]} or {stage}"
    for stage, given in options.stages.items():
        for name, option in COMMANDS[stage].options.items():
            known = {*given, *(option for of, option in [*unread, *_GIVEN_LATER] if of == stage)}
            if option.required and option.in_catalog and name not in known:
                yield stage, name, f"{name} is missing, which is required"
        later: dict[str, Any] = {name: ... for of, name in _GIVEN_LATER if of == stage}
        if stage == "combine":
            later["adapters"] = sources
        refused = {option for of, option in unread if of == stage}
        for name, fault in COMMANDS[stage].faults({**later, **given}, _spelled, unread=refused):
            yield stage, name, fault


def output_fault(name: Any) -> str | None:
    """Why a name cannot be a folder below OUT, or None."""
    if not _is_name(name):
        return "is not a valid folder name"
    parts = name.split("/")
    if name.startswith("/") or "\\" in name or ".." in parts or "." in parts:
        return "points outside the output folder: give a plain name or a path below it"
    if any(part.startswith(".") for part in parts) or parts[0] == "ledger.jsonl":
        return "is reserved: a name that begins with a dot, and ledger.jsonl, belong to the run"
    if not all(parts) or not name.isprintable() or any(len(os.fsencode(part)) > 200 for part in parts):
        return "is not a valid folder name"
    return None


def _is_name(value: Any) -> TypeGuard[str]:
    """Whether this is a text that can name a file: JSON's escapes can spell half a character."""
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        return False
    try:
        os.fsencode(value)
    except UnicodeEncodeError:
        return False
    return True


def _last_name(source: str) -> str:
    """``poems`` of ``adapters/poems/`` and of ``artist/poems@main``."""
    plain = source if os.path.exists(source) else source.partition("@")[0].replace(":", "/")
    return os.path.basename(os.path.normpath(plain))


def _takes(stage: str, name: str) -> bool:
    option = COMMANDS[stage].options.get(name)
    return option is not None and option.in_catalog


def _spelled(name: str, value: Any) -> str:
    return name if value is ... else f"{name}: {value}"


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
