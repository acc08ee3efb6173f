"""The report of a merged model as a page: what of the update survives in the stored weights, by layer and module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mapconv.checkpoint.filenames import MERGE_RECORD
from mapconv.errors import AdapterError
from mapconv.formats.mapdir import read_record
from mapconv.metadata.survived import MEASURES
from mapconv.reporting.datatable import Column, DataTable, numeric
from mapconv.reporting.heatmap import Measure, heat_map
from mapconv.reporting.layout import Layout, lay_out
from mapconv.reporting.markup import element
from mapconv.reporting.numbers import number, text
from mapconv.reporting.origins import origin
from mapconv.reporting.page import build_page, definitions, section, tiles
from mapconv.reporting.scales import spanning
from mapconv.wording import small

_TITLES = {"projection": "update that survives", "changed": "share of the values that changed", "error": "ε"}


@dataclass(frozen=True)
class MergedFacts:
    """``tensors`` are those that the merge changed, as ``map_merge.json`` has them; ``survival`` sums them up."""

    folder: Path
    record: Mapping[str, Any]
    survival: Mapping[str, Any]
    layout: Layout
    measures: tuple[Measure, ...]

    @property
    def tensors(self) -> Sequence[Mapping[str, Any]]:
        return self.survival["tensors"]


def merged_facts(folder: Path) -> MergedFacts:
    """Read a merged model's record.

    Raises:
        AdapterError: broken, or written before merges measured what survives.
    """
    record = read_record(folder / MERGE_RECORD)
    survival = record.get("survival")
    if not survival or not survival["tensors"]:
        raise AdapterError(f"{folder / MERGE_RECORD} says nothing of what survives in the weights: merge again.")
    tensors = survival["tensors"]
    paths = [item["modules"][0] if len(item["modules"]) == 1 else _path(item["tensor"]) for item in tensors]
    measures = []
    for key, about in MEASURES.items():
        values = [number(item[key]) for item in tensors]
        measures.append(Measure(key, _TITLES[key], about, values, spanning(values), small))
    return MergedFacts(folder, record, survival, lay_out(paths), tuple(measures))


def merged_page(facts: MergedFacts) -> str:
    table = _table(facts)
    lead = element("p", "A merged model: what of the update its stored weights hold, by module and layer.")
    figures = element("div", *(heat_map(measure, facts.layout) for measure in facts.measures), class_="maps")
    sections = [
        section("summary", "Summary", tiles(list(_tiles(facts)))),
        section("maps", "By layer and module type", figures),
        section("tensors", "Merged tensors", table.place()),
        section("provenance", "Made from", definitions(list(_provenance(facts)))),
    ]
    return build_page(facts.folder.resolve().name, lead, sections, [table])


def _tiles(facts: MergedFacts) -> Iterable[tuple[str, str, str]]:
    survival, tensors = facts.survival, facts.tensors
    yield "merged tensors", f"{len(tensors):,}", ", ".join(dict.fromkeys(item["dtype"] for item in tensors))
    least, worst = min(item["projection"] for item in tensors), max(item["error"] for item in tensors)
    yield "update that survives", small(survival["projection"]), f"least {small(least)}"
    yield "values that changed", f"{survival['changed']:.1%}", "of the stored ones"
    yield "ε", small(survival["error"]), f"worst {small(worst)}"


def _table(facts: MergedFacts) -> DataTable:
    tensors, layout = facts.tensors, facts.layout
    place_of = {member: place for place, members in layout.members.items() for member in members}
    numbers = [
        Column(key, _TITLES[key], lambda index, key=key: numeric(number(tensors[index][key]), small), "number", width)
        for key, width in (("projection", 20), ("changed", 30), ("error", 10))
    ]
    columns = [
        Column("tensor", "tensor", lambda index: tensors[index]["tensor"], width=44),
        Column("type", "type", lambda index: layout.types[place_of[index][0]], "choice", 12),
        *numbers,
        Column("dtype", "dtype", lambda index: tensors[index]["dtype"], "choice", 8),
        Column("modules", "modules", lambda index: ", ".join(tensors[index]["modules"]), hidden=True),
    ]
    return DataTable("tensors", "tensors", columns, range(len(tensors)))


def _provenance(facts: MergedFacts) -> Iterable[tuple[str, object]]:
    record = facts.record
    yield "folder", str(facts.folder)
    yield from origin("base", record.get("base"))
    for source in (record.get("source"), *(record.get("more_sources") or ())):
        yield from origin("adapter", source)
    yield "written by", f"mapconv {text(record.get('mapconv_version'))}"


def _path(tensor: str) -> str:
    return tensor.removesuffix(".weight")
