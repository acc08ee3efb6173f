"""The plot of a model card: α/‖W0‖ and β/α over the layers, one line for each module type (the extra ``report``)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mapconv.adapter import MapModule, layer_of
from mapconv.metadata.figure import INK, figure_png, short_label

#: Okabe and Ito's colours, which colour-blind readers tell apart; the palest is left out.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#282828")
_SIZE = 1600, 720
#: Values that differ by less, relatively, are drawn as the one value that they are.
_FLAT = 1e-4

#: layer -> values, for each module type.
Series = Mapping[str, Mapping[int, Sequence[float]]]


def scalars_png(modules: Sequence[MapModule]) -> bytes | None:
    """The picture as PNG, or None where no module has a layer number to be plotted over."""
    gains, ratios = _series(modules, lambda m: m.base_gain), _series(modules, lambda m: m.beta / (m.alpha or 1.0))
    if not gains:
        return None

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        _panel(left, "α / ‖W0‖", gains)
        _panel(right, "β / α", ratios)
        names = [short_label(name, 40) for name in gains]
        figure.legend(left.get_lines(), names, loc="outside lower left", ncols=7, frameon=False)

    return figure_png(*_SIZE, draw)


def _panel(axis: Axes, title: str, series: Series) -> None:
    axis.set_title(title, color=INK)
    axis.set_xlabel("layer")
    axis.grid(axis="y", color="#e1e1e1")
    axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axis.ticklabel_format(useOffset=False)
    for number, found in enumerate(series.values()):
        color = _COLORS[number % len(_COLORS)]
        layers = sorted(found)
        axis.plot(layers, [sum(found[layer]) / len(found[layer]) for layer in layers], color=color, alpha=0.75)
        points = [(layer, value) for layer in layers for value in found[layer]]
        axis.scatter(*zip(*points, strict=True), color=color, s=24, zorder=3)
    values = [value for layers in series.values() for found in layers.values() for value in found]
    low, high = min(values), max(values)
    if high - low < _FLAT * max(abs(high), abs(low), 1e-2):
        spread = 0.1 * max(abs(high), 1e-2)
        axis.set_ylim(low - spread, high + spread)


def _series(modules: Sequence[MapModule], value: Callable[[MapModule], float]) -> dict[str, dict[int, list[float]]]:
    series: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for module in modules:
        layer = layer_of(module.path)
        if layer is not None and math.isfinite(value(module)):
            series[module.path.rpartition(".")[2]][layer].append(value(module))
    return {name: dict(layers) for name, layers in series.items()}
