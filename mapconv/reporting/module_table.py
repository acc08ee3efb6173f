"""The table of an adapter's modules: a row each, with all that is known of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mapconv.reporting.adapter_facts import AdapterFacts, update_ratio
from mapconv.reporting.datatable import Column, DataTable, numeric
from mapconv.reporting.numbers import number, text
from mapconv.wording import count, gain, small


def module_table(facts: AdapterFacts) -> DataTable:
    """Rows are modules by number; what no module has is not a column."""
    modules, records, layout = facts.modules, facts.records, facts.layout
    place_of = {member: place for place, members in layout.members.items() for member in members}
    entries = facts.verified.get("modules")
    entries = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    verified = {text(entry.get("path")): number(entry.get("error")) for entry in entries}

    def numbers(
        key: str, label: str, values: Sequence[float | None], spell: Callable[[float | None], str], width: int = 10
    ) -> Column:
        """A column of numbers that is seen only in details where its width is 0."""
        return Column(key, label, lambda index: numeric(values[index], spell), "number", width, hidden=not width)

    def recorded(key: str) -> list[float | None]:
        return [number(record.get(key)) for record in records]

    columns = [
        Column("path", "module", lambda index: modules[index].path, width=34),
        Column("type", "type", lambda index: layout.types[place_of[index][0]], "choice", 12),
        numbers("layer", "layer", [layout.layers[place_of[index][1]] for index in range(len(modules))], count, 7),
        numbers("expert", "expert", [number(module.expert) for module in modules], count, 8),
        numbers("rank", "rank", [number(module.rank) for module in modules], count, 7),
        numbers("gain", "α/‖W0‖", [module.base_gain for module in modules], gain),
        numbers("ratio", "β/α", [update_ratio(module) for module in modules], small),
        numbers("before", "ε before", recorded("error_before"), small),
        numbers("error", "ε", [module.error for module in modules], small),
        numbers("output", "output error", recorded("output_error"), small, 13),
        numbers("alpha", "α", [module.alpha for module in modules], small, 0),
        numbers("beta", "β", [module.beta for module in modules], small, 0),
        numbers("base_norm", "‖W0‖", [module.base_norm for module in modules], small, 0),
        numbers("direction_norm", "‖Δ‖", [module.direction_norm for module in modules], small, 0),
        numbers("update_gain", "β/‖Δ‖", [module.update_gain for module in modules], small, 0),
        numbers("alpha_before", "α before", recorded("alpha_before"), small, 0),
        numbers("beta_before", "β before", recorded("beta_before"), small, 0),
        numbers("verified", "ε of PEFT's merged weight", [verified.get(module.path) for module in modules], small, 0),
        Column("direction", "direction", lambda index: modules[index].direction, hidden=True),
        Column("tensor", "base tensor", lambda index: text(records[index].get("base_tensor")), hidden=True),
        Column("shape", "base shape", lambda index: _shape(records[index].get("base_shape")), hidden=True),
        Column("dtype", "base dtype", lambda index: text(records[index].get("base_dtype")), hidden=True),
    ]
    known = [c for c in columns if c.kind != "number" or any(c.cell(n)[1] != count(None) for n in range(len(modules)))]
    return DataTable("modules", "modules", known, range(len(modules)))


def _shape(value: Any) -> str:
    return "×".join(map(str, value)) if isinstance(value, list) else text(value)
