"""The report of one MAP adapter as a page."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from mapconv.reporting.adapter_facts import AdapterFacts, update_ratio
from mapconv.reporting.charts import dots_figure
from mapconv.reporting.datatable import Column, DataTable, numeric
from mapconv.reporting.heatmap import heat_map
from mapconv.reporting.markup import Html, element
from mapconv.reporting.numbers import count, gain, number, size, small, text
from mapconv.reporting.page import build_page, definitions, section, tiles

#: KL(source ‖ model) of each model, by its key in the record of a calibration.
_CALIBRATION_KL = (("base", "kl_base"), ("closed form", "kl_before"), ("calibrated", "kl_after"))


def adapter_page(facts: AdapterFacts) -> str:
    table = _module_table(facts)
    lead = element("p", "A MAP adapter: ", element("code", "W' = α·W0/‖W0‖ + β·Δ/‖Δ‖"), ", by module and layer.")
    figures = element("div", *(heat_map(measure, facts.layout) for measure in facts.measures), class_="maps")
    sections = [
        section("summary", "Summary", tiles(list(_tiles(facts)))),
        section("maps", "By layer and module type", figures),
        *_fidelity(facts),
        section("modules", "Modules", table.place()),
        section("provenance", "Made from", definitions(list(_provenance(facts)))),
    ]
    return build_page(facts.adapter.path.resolve().name, lead, sections, [table])


def _tiles(facts: AdapterFacts) -> Iterable[tuple[str, str, str]]:
    errors = [module.error for module in facts.modules]
    gains = [module.base_gain for module in facts.modules]
    adapter = facts.adapter
    yield "modules", f"{len(errors):,}", f"of {len(facts.layout.types)} types"
    yield "parameters", f"{adapter.parameters:,}", f"{size(adapter.nbytes)} stored"
    yield "ε, median", small(statistics.median(errors)), f"worst {small(max(errors))}"
    yield "α/‖W0‖, median", gain(statistics.median(gains)), f"{gain(min(gains))} … {gain(max(gains))}"
    if (kl := number(facts.verified.get("kl"))) is not None:
        base = number(facts.verified.get("kl_base"))
        yield "KL to the source", small(kl), f"{small(base)} without the adapter"
    yield "PEFT loads it as", "DoRA" if adapter.config.get("use_dora") else "LoRA", "stock, without mapconv"


def _fidelity(facts: AdapterFacts) -> Iterable[Html]:
    """KL(source ‖ model) in each of the two measurements that there may be: their texts differ, and so the values."""
    figures = []
    verified, calibration = facts.verified, facts.calibration
    if number(verified.get("kl")) is not None:
        rows = [("base", verified.get("kl_base"), "without an adapter"), ("source", 0.0, "0 by definition")]
        rows.append(("this adapter", verified.get("kl"), "as stored"))
        positions = count(number(verified.get("tokens")))
        about = f"Mean KL(source ‖ model) in nats at {positions} positions, by mapconv verify."
        figures.append(_kl_figure("verified", about, rows))
    if any(number(calibration.get(key)) is not None for _, key in _CALIBRATION_KL):
        rows = [(name, calibration.get(key), "on the held-out text") for name, key in _CALIBRATION_KL]
        rows.insert(1, ("source", 0.0, "0 by definition"))
        figures.append(
            _kl_figure("calibration", "Mean KL(source ‖ model) in nats on calibration's held-out text.", rows)
        )
    if figures:
        more = [row for row in _verify_rows(verified) if row[1]]
        yield section(
            "fidelity",
            "Against the source",
            element("div", *figures, class_="pair"),
            definitions(more) if more else None,
        )


def _kl_figure(key: str, about: str, rows: list[tuple[str, Any, str]]) -> Html:
    found = [(name, number(value), what) for name, value, what in rows]
    return dots_figure(key, "KL to the source", f"{about} Logarithmic axis.", found, small)


def _verify_rows(verified: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    if (agreement := number(verified.get("top1_agreement"))) is not None:
        yield "same most likely token", f"{agreement:.2%} of positions"
    for name, key in (
        ("base", "perplexity_base"),
        ("source", "perplexity_source"),
        ("this adapter", "perplexity_result"),
    ):
        if (value := number(verified.get(key))) is not None:
            yield f"perplexity, {name}", small(value)
    if (value := number(verified.get("kl_largest"))) is not None:
        yield "largest KL at one position", small(value)


def _module_table(facts: AdapterFacts) -> DataTable:
    measured = {text(entry.get("path")): number(entry.get("error")) for entry in _tables(facts.verified.get("modules"))}
    place_of = {member: place for place, members in facts.layout.members.items() for member in members}
    # What no module has is no column.
    before, output = (
        measure if any(value is not None for value in measure) else None
        for measure in (
            [number(record.get(key)) for record in facts.records] for key in ("error_before", "output_error")
        )
    )
    experts = any(module.expert is not None for module in facts.modules)
    columns = [
        Column("path", "module", width=34),
        Column("type", "type", "choice", 12),
        Column("layer", "layer", "number", 7),
        *([Column("expert", "expert", "number", 8)] if experts else []),
        Column("rank", "rank", "number", 7),
        Column("gain", "α/‖W0‖", "number", 10),
        Column("ratio", "β/α", "number", 10),
        *([Column("before", "ε before", "number", 10)] if before else []),
        Column("error", "ε", "number", 10),
        *([Column("output", "output error", "number", 13)] if output else []),
        *(
            Column(key, label, kind, hidden=True)
            for key, label, kind in (
                ("alpha", "α", "number"), ("beta", "β", "number"), ("base_norm", "‖W0‖", "number"),
                ("direction_norm", "‖Δ‖", "number"), ("update_gain", "β/‖Δ‖", "number"),
                ("measured", "ε of PEFT's merged weights (verify)", "number"), ("direction", "direction", "text"),
                ("tensor", "base tensor", "text"), ("shape", "base shape", "text"),
            )
        ),
    ]  # fmt: skip
    rows = []
    for index, (module, record) in enumerate(zip(facts.modules, facts.records, strict=True)):
        row, column = place_of[index]
        rows.append(
            [
                module.path,
                facts.layout.types[row],
                numeric(facts.layout.layers[column], count),
                *([numeric(module.expert, count)] if experts else []),
                numeric(module.rank, count),
                numeric(module.base_gain, gain),
                numeric(update_ratio(module), small),
                *([numeric(before[index], small)] if before else []),
                numeric(module.error, small),
                *([numeric(output[index], small)] if output else []),
                *(numeric(value, small) for value in (module.alpha, module.beta, module.base_norm)),
                *(numeric(value, small) for value in (module.direction_norm, module.update_gain)),
                numeric(measured.get(module.path), small),
                module.direction,
                text(record.get("base_tensor")),
                _shape(record),
            ]
        )
    return DataTable("modules", "modules", columns, rows)


def _shape(record: Mapping[str, Any]) -> str:
    shape = record.get("base_shape")
    sizes = "×".join(map(str, shape)) if isinstance(shape, list) else text(shape)
    return f"{sizes} {text(record.get('base_dtype'))}".strip()


def _provenance(facts: AdapterFacts) -> Iterable[tuple[str, object]]:
    record = facts.record
    yield "folder", str(facts.adapter.path)
    yield from _origin("base", record.get("base"))
    source: Any = record.get("source")
    yield from _origin("source", source)
    while isinstance(source, dict) and isinstance(source.get("source"), dict):
        source = source["source"]
        yield from _origin("made from", source)
    yield from _settings("options", record.get("options"))
    yield from _settings("calibration", facts.calibration)
    yield "written by", f"mapconv {text(record.get('mapconv_version'))}"


def _origin(name: str, origin: Any) -> Iterable[tuple[str, object]]:
    found = origin if isinstance(origin, dict) else {}
    revision = f" @ {text(found['revision'])}" if found.get("revision") else ""
    method = f" ({text(found['method'])})" if found.get("method") else ""
    yield name, f"{text(found.get('name')) or 'not recorded'}{revision}{method}"
    if found.get("fingerprint"):
        yield f"{name}'s fingerprint", element("code", text(found["fingerprint"]))


def _settings(name: str, settings: Any) -> Iterable[tuple[str, object]]:
    """Plain values as ``key = value``; tables within have their own figures."""
    if isinstance(settings, dict) and settings:
        plain = (
            f"{key} = {text(v)}" for key, v in settings.items() if v is not None and not isinstance(v, dict | list)
        )
        yield name, ", ".join(plain)


def _tables(value: Any) -> list[dict[str, Any]]:
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []
