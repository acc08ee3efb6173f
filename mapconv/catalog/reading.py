"""Read a catalog: a YAML or JSONL file, or a folder of adapters; all of its faults at once, with their lines.

    defaults: {base: BASE, upgrade: {OPTION: VALUE}, …}     what every entry takes over, option by option
    adapters:                                               a list; in JSONL, one object a line after the defaults
      - source: FOLDER or Hub reference                     needed; with combine a list of them
        base: FOLDER or Hub id                              default: what the adapter's configuration names
        output: NAME                                        folder below OUT; default: the source's last name
        upgrade: {…}  verify: {…}  merge: {…}  push: {…}    options of these functions; `true` for none, `false` for off
        extract: {…}  rebase: {…}  or  combine: {…}         in place of upgrade

A path is taken from the catalog's own folder if it exists there. Entries without the last three are only upgraded.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mapconv.catalog.checking import Checker
from mapconv.catalog.entries import Entry
from mapconv.catalog.records import Faults, Record
from mapconv.errors import CatalogError
from mapconv.jsonfile import without_duplicates
from mapconv.untrusted import yamltext

#: A folder that holds one of these is meant as an adapter, even if the others are missing.
_ADAPTER_NAMES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_LONGEST_LINE = 1 << 20
_MOST_FOLDERS = 100_000
#: About 500,000 entries; more belong into JSONL, which is read line by line.
_LONGEST_YAML = 1 << 26


def read_catalog(path: Path) -> list[Entry]:
    """Every entry of a catalog, checked; adapters' files are not opened.

    Raises:
        CatalogError: with every fault of the file and its line.
    """
    if path.is_dir():
        return list(_folder_entries(path))
    if not path.exists():
        raise CatalogError(f"{path} does not exist: give a catalog (.yaml or .jsonl), or a folder of adapters.")
    faults = Faults(path)
    checker = Checker(path.parent, faults)
    records = _yaml_records if path.suffix.lower() in (".yaml", ".yml") else _jsonl_records
    entries = []
    for kind, record in records(path, faults):
        if kind == "defaults":
            checker.set_defaults(record)
        else:
            entry = checker.entry(record)
            if entry is not None:
                entries.append(entry)
    faults.check()
    if not entries:
        raise CatalogError(f"{path} lists no adapters: add one with a source.")
    return entries


def _folder_entries(folder: Path) -> Iterator[Entry]:
    """Each adapter folder below ``folder``, by its path from there; what lies inside an adapter is part of it."""
    from mapconv.catalog.entries import Options

    options, found = Options({"upgrade": {}}), False
    above: dict[str, tuple[str, ...]] = {}
    count = 0
    for root, folders, files in os.walk(folder, followlinks=True):
        # A link to a folder that holds it would go round for ever; to another one it is an adapter's other name.
        above[root] = (*above.get(os.path.dirname(root), ()), os.path.realpath(root))
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and os.path.realpath(os.path.join(root, name)) not in above[root]
        )
        if root != str(folder) and any(name in files for name in _ADAPTER_NAMES):
            folders.clear()
            found = True
            yield Entry(Path(root).relative_to(folder).as_posix(), (os.path.abspath(root),), None, options)
            continue
        count += 1
        if count > _MOST_FOLDERS:  # links may multiply without a circle
            raise CatalogError(
                f"{folder} has more than {_MOST_FOLDERS:,} folders without an adapter: name the adapters in a file."
            )
    if not found:
        raise CatalogError(f"{folder} holds no folders with an adapter_config.json: it is not a folder of adapters.")


def _jsonl_records(path: Path, faults: Faults) -> Iterator[tuple[str, Record]]:
    """One line at a time, so that a long file takes no memory."""
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(_LONGEST_LINE + 1):
            number += 1
            if len(line) > _LONGEST_LINE:
                why = f"longer than {_LONGEST_LINE:,} bytes: it is not an entry, and nothing after it is read"
                faults.add(number, why)
                return
            if not line.strip():
                continue
            try:
                table = json.loads(line, object_pairs_hook=without_duplicates)
            except (ValueError, RecursionError) as error:
                faults.add(number, f"not JSON ({_short(error)})")
                continue
            if isinstance(table, dict) and "defaults" in table:
                if number > 1 or len(table) > 1:
                    faults.add(number, "defaults stand alone in the first line")
                else:
                    yield "defaults", Record(table["defaults"], number)
            else:
                yield "entry", Record(table, number)


def _yaml_records(path: Path, faults: Faults) -> Iterator[tuple[str, Record]]:
    import yaml

    try:
        with open(path, "rb") as file:
            loader, node = yamltext.parse(file.read(_LONGEST_YAML + 1), longest=_LONGEST_YAML)
    except yamltext.YamlError as error:
        faults.add(error.line, str(error))
        return
    if isinstance(node, yaml.MappingNode):
        top = {}
        for key, value in node.value:
            if key.value not in ("defaults", "adapters") or key.value in top:
                faults.add(
                    key.start_mark.line + 1, f"unexpected key {_short(key.value)!r}: expected defaults, adapters"
                )
            else:
                top[key.value] = value
        if "defaults" in top:
            yield "defaults", _located(yaml, loader, top["defaults"], faults)
        node = top.get("adapters")
    if not isinstance(node, yaml.SequenceNode):
        faults.add(node.start_mark.line + 1 if node else 1, "expected a list of adapters")
        return
    for item in node.value:
        yield "entry", _located(yaml, loader, item, faults)


def _located(yaml: Any, loader: Any, node: Any, faults: Faults) -> Record:
    """A node as a value, with the lines of its keys."""
    lines: dict[tuple[str, ...], int] = {}

    def value_of(node: Any, place: tuple[str, ...]) -> Any:
        if not isinstance(node, yaml.MappingNode):
            try:
                return yamltext.construct(loader, node)
            except yamltext.YamlError as error:
                faults.add(error.line, str(error))
                return None
        table = {}
        for key, item in node.value:
            name, line = key.value, key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                faults.add(line, "a key must be a word")
            elif name in table:
                faults.add(line, f"the key {name!r} occurs twice")
            else:
                lines[(*place, name)] = line
                table[name] = value_of(item, (*place, name))
        return table

    return Record(value_of(node, ()), node.start_mark.line + 1, lines)


def _short(error: object) -> str:
    return " ".join(str(error).split())[:160]
