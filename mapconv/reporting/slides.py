"""The figures of a report as one picture of 1920 × 1080 pixels, drawn with matplotlib (the extra ``report``)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from mapconv.metadata.figure import INK, figure_png, short_label
from mapconv.reporting.adapter_facts import AdapterFacts
from mapconv.reporting.catalog_page import DISTRIBUTIONS
from mapconv.reporting.charts import histogram
from mapconv.reporting.heatmap import Measure
from mapconv.reporting.layout import Layout
from mapconv.reporting.ledger import Ledger
from mapconv.reporting.merged_page import MergedFacts
from mapconv.reporting.scales import ramp
from mapconv.wording import short, small, tick

_BAR = "#3f5f95"


def adapter_slide(facts: AdapterFacts) -> bytes:
    """The heat maps of an adapter as PNG."""
    title = f"{facts.adapter.path.resolve().name}: {len(facts.modules):,} modules in MAP form"
    return _heat_slide(title, facts.measures, facts.layout)


def merged_slide(facts: MergedFacts) -> bytes:
    """The heat maps of a merged model as PNG."""
    kept = small(facts.survival["projection"])
    title = f"{facts.folder.resolve().name}: {kept} of the update survives in {len(facts.tensors):,} tensors"
    return _heat_slide(title, facts.measures, facts.layout)


def _heat_slide(title: str, measures: Sequence[Measure], layout: Layout) -> bytes:
    def draw(figure: Figure) -> None:
        columns = 1 if len(measures) <= 2 else 2
        axes = figure.subplots(math.ceil(len(measures) / columns), columns, squeeze=False).ravel()
        for number, axis in enumerate(axes):
            if number < len(measures):
                _heat(axis, measures[number], layout)
            else:
                axis.set_axis_off()

    return _slide(title, draw)


def catalog_slide(ledger: Ledger) -> bytes:
    """The distributions of a catalog as PNG, and its counts."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots(2, 3).ravel()
        for axis, (_, title, _, value, spell) in zip(axes, DISTRIBUTIONS, strict=False):
            _bars(axis, title, [value(entry) for entry in ledger.done], spell)
        _counts(axes[-1], ledger)

    title = f"{ledger.folder.resolve().name}: {len(ledger.done):,} of {len(ledger.entries):,} adapters in MAP form"
    return _slide(title, draw)


def _slide(title: str, draw: Callable[[Figure], None]) -> bytes:
    def draw_all(figure: Figure) -> None:
        figure.suptitle(short_label(title, 90), x=0.01, ha="left", fontsize=20, color=INK)
        draw(figure)

    return figure_png(1920, 1080, draw_all)


def _heat(axis: Axes, measure: Measure, layout: Layout) -> None:
    rows, columns = len(layout.types), len(layout.layers)
    grid = [[measure.at(layout.members.get((row, column), ())) for column in range(columns)] for row in range(rows)]
    values = [[math.nan if value is None else value for value in line] for line in grid]
    scale = measure.scale
    axis.patch.set(hatch="////", edgecolor="#b9bcc0", facecolor="white")  # what shows where there is no value
    high = scale.high if scale.high > scale.low else scale.low + 1
    image = axis.imshow(
        values, cmap=ListedColormap(ramp(scale.kind, "light")), norm=Normalize(scale.low, high), aspect="auto",
        interpolation="nearest",
    )  # fmt: skip
    axis.set_title(f"{measure.title}   {measure.span}")
    axis.set_yticks(range(rows), [short_label(name, 22) for name in layout.types], fontsize=11 if rows <= 14 else 7)
    shown = range(0, columns, max(1, math.ceil(columns / 12)))
    axis.set_xticks(shown, ["–" if layout.layers[n] is None else str(layout.layers[n]) for n in shown])
    axis.set_xlabel("layer")
    if scale.high > scale.low:
        bar = axis.figure.colorbar(image, ax=axis, pad=0.01)
        spell = measure.spell if scale.kind == "d" else short
        bar.set_ticks(list(scale.ticks), labels=[spell(value) for value in scale.ticks])


def _bars(axis: Axes, title: str, values: Sequence[float | None], spell: Callable[[float | None], str]) -> None:
    found = histogram(values)
    left_out = [f"{n:,} {what}" for n, what in ((found.zeros, "exactly 0"), (found.absent, "without a number")) if n]
    axis.set_title(title)
    axis.set_xlabel(", ".join(left_out) or " ", fontsize=11)
    if not found.bins:
        axis.set_axis_off()
        axis.text(0.5, 0.5, "no numbers", ha="center", transform=axis.transAxes)
        return
    if found.logarithmic:
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(lambda value, _: tick(spell(value)))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.xaxis.set_major_locator(LogLocator(numticks=6))
    edges = [found.bins[0].low, *(bar.high for bar in found.bins)]
    axis.stairs([bar.count for bar in found.bins], edges, fill=True, color=_BAR)
    axis.set_ylabel("entries")


def _counts(axis: Axes, ledger: Ledger) -> None:
    methods = sorted({entry.method for entry in ledger.entries})[:8]
    done = [sum(entry.method == method for entry in ledger.done) for method in methods]
    failed = [sum(entry.method == method for entry in ledger.failed) for method in methods]
    names = [short_label(method or "–", 16) for method in methods]
    places = range(len(methods))
    axis.barh(places, done, color=_BAR, label="done")
    axis.barh(places, failed, left=done, color="#b4490b", label="failed")
    axis.set_yticks(places, names)
    axis.invert_yaxis()
    axis.set_title("entries by method")
    if methods:
        axis.legend(frameon=False)
