"""The report of one MAP adapter as a page."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from mapconv.metadata.rebased import SERVED_MODELS, verdict
from mapconv.reporting.adapter_facts import AdapterFacts, update_shares
from mapconv.reporting.charts import bars_figure, dots_figure
from mapconv.reporting.heatmap import heat_map
from mapconv.reporting.markup import Html, element, table
from mapconv.reporting.module_table import module_table
from mapconv.reporting.numbers import finite_or_none, number, text
from mapconv.reporting.origins import origin
from mapconv.reporting.page import build_page, definitions, section, tiles
from mapconv.wording import NONE, count, gain, rough_percent, size, small

#: Whose numbers a calibration records, in its own words.
_CALIBRATED = ("base", "source", "closed form", "calibrated")
#: Up to which share of the base's KL to the source a result deserves which words.
_WORTH = (
    (0.01, "Very good: the adapter answers almost exactly as its source does."),
    (0.1, "Good: the adapter answers much as its source does."),
    (0.5, "Fair: a part of what the source does is lost."),
    (1.0, "Poor: most of what the source does is lost."),
    (math.inf, "Bad: the adapter is further from its source than the base model without it."),
)


def adapter_page(facts: AdapterFacts) -> str:
    modules = module_table(facts)
    lead = element("p", "A MAP adapter: ", element("code", "W' = α·W0/‖W0‖ + β·Δ/‖Δ‖"), ", by module and layer.")
    maps = (heat_map(measure, facts.layout) for measure in facts.measures)
    figures = element("div", *_shares(facts), *maps, class_="maps")
    sections = [
        *_rebase(facts),
        section("summary", "Summary", tiles(list(_tiles(facts)))),
        *_fidelity(facts),
        section("maps", "By layer and module type", figures),
        section("modules", "Modules", modules.place()),
        section("provenance", "Made from", definitions(list(_provenance(facts)))),
    ]
    return build_page(facts.adapter.path.resolve().name, lead, sections, [modules])


def _shares(facts: AdapterFacts) -> Iterable[Html]:
    """Where in the model the update lies."""
    shares = [(NONE if layer is None else str(layer), share) for layer, share in update_shares(facts)]
    if shares:
        about = (
            "The part of the whole update's squared norm that lies in each layer: β² of its modules beside the sum "
            "over all. The parts add up to 100 %."
        )
        yield bars_figure("shares", "Share of the update by layer", about, shares, rough_percent, "layer")


def _tiles(facts: AdapterFacts) -> Iterable[tuple[str, str, str]]:
    errors = [error for module in facts.modules if (error := finite_or_none(module.error)) is not None]
    gains = [module.base_gain for module in facts.modules]
    adapter = facts.adapter
    yield "modules", f"{len(facts.modules):,}", f"of {len(facts.layout.types)} types"
    yield "parameters", f"{adapter.parameters:,}", f"{size(adapter.nbytes)} stored"
    if errors:
        yield "ε, median", small(statistics.median(errors)), f"worst {small(max(errors))}"
    yield "α/‖W0‖, median", gain(statistics.median(gains)), f"{gain(min(gains))} … {gain(max(gains))}"
    if (kl := number(facts.verified.get("kl"))) is not None:
        base = number(facts.verified.get("kl_base"))
        yield "KL to the source", small(kl), f"{small(base)} without the adapter"
    yield "PEFT loads it as", "DoRA" if adapter.config.get("use_dora") else "LoRA", "stock, without mapconv"


def _rebase(facts: AdapterFacts) -> Iterable[Html]:
    """What the adapter is worth on the base that it was rebased to: the verdict, then the divergences behind it."""
    rebase = facts.rebase
    if not rebase:
        return
    served = rebase.get("served")
    children = [element("p", verdict(served))]
    if served:
        rows = [(what, served[name].get("kl"), _perplexity(served[name])) for name, what in SERVED_MODELS.items()]
        about = f"Mean KL(source ‖ model) in nats at {count(number(served['positions']))} unseen positions."
        children.append(_kl_figure("served", "KL to the source on its own base", about, rows))
    yield section("rebase", "Rebased", *children)


def _fidelity(facts: AdapterFacts) -> Iterable[Html]:
    """KL(source ‖ model) in each of the two measurements that there may be: their texts differ, and so the values."""
    figures = []
    verified, calibration = facts.verified, facts.calibration
    if number(verified.get("kl")) is not None:
        rows = [("base", verified.get("kl_base"), "without an adapter"), ("source", 0.0, "0 by definition")]
        rows.append(("this adapter", verified.get("kl"), "as stored"))
        positions = count(number(verified.get("tokens")))
        about = f"Mean KL(source ‖ model) in nats at {positions} positions, by mapconv verify."
        figures.append(_kl_figure("verified", "KL to the source, verified", about, rows))
    models = _named_tables(calibration.get("models"))
    if models:
        rows = [(name, models[name].get("kl"), _perplexity(models[name])) for name in _CALIBRATED if name in models]
        positions = count(number(calibration.get("held_out_positions")))
        about = f"Mean KL(source ‖ model) in nats at {positions} held-out positions, by mapconv calibrate."
        figures.append(_kl_figure("calibration", "KL to the source, held-out text", about, rows))
    if figures:
        more = [*_verify_rows(verified)]
        pair = element("div", *figures, class_="pair")
        yield section(
            "fidelity",
            "Against the source",
            _verdict(facts),
            pair,
            definitions(more) if more else None,
            _history(calibration),
        )


def _verdict(facts: AdapterFacts) -> Html | None:
    """One sentence on whether the KL is good: beside that of the base, which has nothing of the adapter."""
    models = _named_tables(facts.calibration.get("models"))
    measured = (
        (facts.verified.get("kl"), facts.verified.get("kl_base")),
        (models.get("calibrated", {}).get("kl"), models.get("base", {}).get("kl")),
    )
    for found, alone in measured:
        kl, base = finite_or_none(number(found)), finite_or_none(number(alone))
        if kl is None or base is None or kl < 0 or base <= 0:
            continue
        share = kl / base
        worth = next(said for limit, said in _WORTH if share <= limit)
        return element(
            "p", element("strong", worth), f" Its KL to the source is {small(kl)}; without it, {small(base)}."
        )
    return None


def _history(calibration: Mapping[str, Any]) -> Html | None:
    """The held-out objective over a calibration's steps, as a table that opens."""
    history = calibration.get("history")
    pairs = [pair for pair in history if isinstance(pair, list) and len(pair) == 2] if isinstance(history, list) else []
    if not pairs:
        return None
    stored = calibration.get("update_sizes")
    entries = stored if isinstance(stored, list) else []
    sizes = {number(entry[0]): number(entry[1]) for entry in entries if isinstance(entry, list) and len(entry) == 2}
    rows = [(count(number(step)), small(number(value)), small(sizes.get(number(step)))) for step, value in pairs]
    names = ("step", "held-out objective", "|β|/‖W0‖, median")
    numbers = table(names, rows, caption="Calibration, step by step")
    return element("details", element("summary", "Calibration, step by step"), numbers, class_="card")


def _perplexity(model: Mapping[str, Any]) -> str:
    value = number(model.get("perplexity"))
    return "" if value is None else f"perplexity {small(value)}"


def _kl_figure(key: str, title: str, about: str, rows: list[tuple[str, Any, str]]) -> Html:
    found = [(name, number(value), what) for name, value, what in rows]
    return dots_figure(key, title, f"{about} Logarithmic axis.", found, small)


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


def _provenance(facts: AdapterFacts) -> Iterable[tuple[str, object]]:
    record = facts.record
    yield "folder", str(facts.adapter.path)
    yield from origin("base", record.get("base"))
    if facts.rebase:
        yield from origin("rebased from", facts.rebase["from"])
    source: Any = record.get("source")
    yield from origin("source", source)
    while isinstance(source, dict) and isinstance(source.get("source"), dict):
        source = source["source"]
        yield from origin("made from", source)
    yield from _settings("options", record.get("options"))
    yield from _settings("calibration", facts.calibration)
    yield "written by", f"mapconv {text(record.get('mapconv_version'))}"


def _settings(name: str, settings: Any) -> Iterable[tuple[str, object]]:
    """Plain values as ``key = value``; tables within have their own figures."""
    if isinstance(settings, dict) and settings:
        plain = (
            f"{key} = {text(v)}" for key, v in settings.items() if v is not None and not isinstance(v, dict | list)
        )
        yield name, ", ".join(plain)


def _named_tables(value: Any) -> dict[str, dict[str, Any]]:
    return {name: entry for name, entry in value.items() if isinstance(entry, dict)} if isinstance(value, dict) else {}
