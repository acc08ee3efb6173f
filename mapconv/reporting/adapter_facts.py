"""What a MAP directory says of itself, as the report and its picture need it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mapconv.adapter import Adapter, MapModule
from mapconv.fidelity.saved import read_report
from mapconv.formats import read_adapter
from mapconv.reporting.heatmap import Measure
from mapconv.reporting.layout import Layout, lay_out
from mapconv.reporting.numbers import finite_or_none, number
from mapconv.reporting.scales import diverging, sequential, spanning
from mapconv.wording import count, gain, small


@dataclass(frozen=True)
class AdapterFacts:
    """``records`` are the modules as ``map_config.json`` has them, in the order of ``adapter.map_modules``.

    ``verified`` is the stored report of ``mapconv verify``, ``calibration`` the record of ``mapconv calibrate``.
    """

    adapter: Adapter
    layout: Layout
    measures: tuple[Measure, ...]
    records: tuple[Mapping[str, Any], ...]
    verified: Mapping[str, Any]
    calibration: Mapping[str, Any]

    @property
    def modules(self) -> tuple[MapModule, ...]:
        return self.adapter.map_modules

    @property
    def record(self) -> Mapping[str, Any]:
        return self.adapter.map_config or {}

    @property
    def rebase(self) -> Mapping[str, Any]:
        """The record of ``mapconv rebase``; empty for what was made for the source's own base."""
        return self.record.get("rebase") or {}


def adapter_facts(folder: Path) -> AdapterFacts:
    """Read a MAP directory, and ``verify.json`` beside it.

    Raises:
        AdapterError: broken, or a verify.json that was measured on other weights.
    """
    adapter = read_adapter(folder)
    verified = read_report(folder) or {}
    config = adapter.map_config or {}
    records = tuple(config["modules"])
    calibration = config.get("calibration")
    return AdapterFacts(
        adapter=adapter,
        layout=lay_out([module.path for module in adapter.map_modules]),
        measures=tuple(_measures(adapter.map_modules, records, config.get("rebase") or {})),
        records=records,
        verified=verified,
        calibration=calibration if isinstance(calibration, dict) else {},
    )


def update_ratio(module: MapModule) -> float | None:
    """β/α, or None for α = 0."""
    return module.beta / module.alpha if module.alpha else None


def update_shares(facts: AdapterFacts) -> list[tuple[int | None, float]]:
    """(layer, its part of the update's squared norm), layer by layer: β is the norm of a weight's update, and squared
    Frobenius norms add up. Empty where there is one layer, or no update.
    """
    layout, betas = facts.layout, [abs(module.beta) for module in facts.modules]
    largest = max(betas, default=0.0)
    if len(layout.layers) < 2 or not largest:
        return []
    sums = [0.0] * len(layout.layers)
    for (_, column), members in layout.members.items():
        sums[column] += sum((betas[member] / largest) ** 2 for member in members)
    return [(layer, found / sum(sums)) for layer, found in zip(layout.layers, sums, strict=True)]


def _measures(
    modules: Sequence[MapModule], records: Sequence[Mapping[str, Any]], rebase: Mapping[str, Any]
) -> Iterable[Measure]:
    gains = [module.base_gain for module in modules]
    yield Measure(
        "gain",
        "α/‖W0‖",
        "The base gain: what the base weight is multiplied by.",
        gains,
        diverging(gains, 1.0, least=1e-4),
        gain,
    )
    ratios = [update_ratio(module) for module in modules]
    found = [ratio for ratio in map(finite_or_none, ratios) if ratio is not None]
    scale = diverging(found, 0.0) if any(ratio < 0 for ratio in found) else sequential(found)
    yield Measure("ratio", "β/α", "The update's size beside the base's part.", ratios, scale, small)
    yield from _errors(modules, records)
    yield from _outputs(modules, records, rebase)
    ranks = [number(module.rank) for module in modules]
    yield Measure(
        "rank",
        "rank",
        "Rank of the factors.",
        ranks,
        sequential(filter(None, map(finite_or_none, ranks))),
        count,
    )


def _errors(modules: Sequence[MapModule], records: Sequence[Mapping[str, Any]]) -> Iterable[Measure]:
    """ε, and what a calibration changed of it."""
    after: list[float | None] = [module.error for module in modules]
    before = [number(record.get("error_before")) for record in records]
    changes = [None if a is None or b is None else a - b for a, b in zip(after, before, strict=True)]
    calibrated = any(change is not None for change in changes)
    lost = "The share of the source's update that the weight loses; 0 is exact."
    yield Measure("error", "ε after calibration" if calibrated else "ε", lost, after, spanning(after), small, "largest")
    if calibrated:
        about = "ε after calibration less ε before it: the weights move away from the source where the outputs gain."
        known = [change for change in map(finite_or_none, changes) if change is not None]
        yield Measure("change", "change of ε", about, changes, diverging(known, 0.0), small)


def _outputs(
    modules: Sequence[MapModule], records: Sequence[Mapping[str, Any]], rebase: Mapping[str, Any]
) -> Iterable[Measure]:
    """The error of the layers' outputs; of a rebase also what the source on the other base left, on the same scale."""
    after = [number(record.get("output_error")) for record in records]
    known = {
        (entry["path"], entry.get("expert")): entry.get("output_error_before") for entry in rebase.get("modules", ())
    }
    before = [number(known.get((module.path, module.expert))) for module in modules]
    finite = [value for value in map(finite_or_none, [*after, *before]) if value is not None]
    scale, same = sequential(finite), "The same for the layer's outputs, on its inputs"
    if any(value is not None for value in before):
        about = "The part of the wanted change of a layer's outputs that is missing with the source put on this base."
        yield Measure("outputs-before", "output error before the rebase", about, before, scale, small, "largest")
        same = "The same of this adapter, on the scale of the map before"
    if any(value is not None for value in after):
        title = "output error after the rebase" if rebase else "output error"
        about = f"{same}." if rebase else f"{same} of the calibration text."
        yield Measure("output", title, about, after, scale, small, "largest")
