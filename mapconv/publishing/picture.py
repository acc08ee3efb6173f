"""The plot of a model card: α/‖W0‖ and β/α over the layers, one line for each module type."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

from mapconv.adapter import MapModule, layer_of
from mapconv.publishing.raster import Canvas, Color, text_width

#: Okabe and Ito's colours, which colour-blind readers tell apart; the palest is left out.
_COLORS: tuple[Color, ...] = (
    (0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233), (40, 40, 40),
)  # fmt: skip
_GREY, _RULE, _INK = (120, 120, 120), (225, 225, 225), (40, 40, 40)
_WIDTH, _PANEL_HEIGHT, _TOP, _BOTTOM, _LEFT, _GAP = 1600, 430, 70, 80, 140, 160
_LEGEND_ROW = 40
#: Values that differ by less, relatively, are drawn as the one value that they are.
_FLAT = 1e-4

#: layer -> values, for each module type.
Series = Mapping[str, Mapping[int, Sequence[float]]]


def scalars_png(modules: Sequence[MapModule]) -> bytes | None:
    """The picture as PNG, or None where no module has a layer number to be plotted over."""
    gains, ratios = _series(modules, lambda m: m.base_gain), _series(modules, lambda m: m.beta / (m.alpha or 1.0))
    if not gains:
        return None
    legend = _legend_rows(list(gains))
    height = _TOP + _PANEL_HEIGHT + _BOTTOM + _LEGEND_ROW * len(legend) + 10
    canvas = Canvas(_WIDTH, height)
    panel = (_WIDTH - 2 * _LEFT - _GAP + 60) / 2
    _panel(canvas, _LEFT, panel, "α / ‖W0‖", gains, around=1.0)
    _panel(canvas, _LEFT + panel + _GAP, panel, "β / α", ratios, around=0.0)
    for row, entries in enumerate(legend):
        y = _TOP + _PANEL_HEIGHT + _BOTTOM + _LEGEND_ROW * row + 10
        for x, number, name in entries:
            canvas.polyline([(x, y), (x + 40, y)], _color(number), 4)
            canvas.dots([(x + 20, y)], _color(number), 6)
            canvas.text(x + 54, y, name, color=_INK)
    return canvas.png()


def _panel(canvas: Canvas, left: float, width: float, title: str, series: Series, *, around: float) -> None:
    values = [value for layers in series.values() for found in layers.values() for value in found]
    ticks = nice_ticks(min(values), max(values), around=around)
    low, high = ticks[0], ticks[-1]
    layers = sorted({layer for found in series.values() for layer in found})
    first, last = layers[0], max(layers[-1], layers[0] + 1)

    def x_of(layer: int) -> float:
        return left + 20 + (width - 40) * (layer - first) / (last - first)

    def y_of(value: float) -> float:
        return _TOP + _PANEL_HEIGHT * (high - value) / (high - low)

    canvas.text(left, 30, title, unit=3.2, color=_INK)
    digits = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
    for tick in ticks:
        canvas.polyline([(left, y_of(tick)), (left + width, y_of(tick))], _RULE, 2)
        canvas.text(left - 14, y_of(tick), f"{tick:.{digits}f}", color=_GREY, align="right")
    step = max(1, math.ceil((last - first) / 10))
    for layer in range(first, layers[-1] + 1, step):
        canvas.text(x_of(layer), _TOP + _PANEL_HEIGHT + 26, str(layer), color=_GREY, align="center")
    canvas.text(left + width / 2, _TOP + _PANEL_HEIGHT + 58, "layer", color=_GREY, align="center")
    for number, found in enumerate(series.values()):
        means = [(x_of(layer), y_of(sum(found[layer]) / len(found[layer]))) for layer in sorted(found)]
        canvas.polyline(means, _color(number), 4, opacity=0.75)
        canvas.dots([(x_of(layer), y_of(value)) for layer in found for value in found[layer]], _color(number), 6)


def nice_ticks(low: float, high: float, *, around: float) -> list[float]:
    """Four to seven round numbers that enclose the values; values that hardly differ are shown around ``around``."""
    if high - low < _FLAT * max(abs(high), abs(low), 1e-9):
        low, high = min(low, around), max(high, around)
    if high - low < _FLAT * max(abs(high), 1e-2):
        spread = 0.1 * max(abs(high), 1e-2)
        low, high = low - spread, high + spread
    rough = (high - low) / 5
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def _series(modules: Sequence[MapModule], value) -> dict[str, dict[int, list[float]]]:
    series: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for module in modules:
        layer = layer_of(module.path)
        if layer is not None and math.isfinite(value(module)):
            series[module.path.rpartition(".")[2]][layer].append(value(module))
    return {name: dict(layers) for name, layers in series.items()}


def _legend_rows(names: Sequence[str]) -> list[list[tuple[float, int, str]]]:
    """Rows of (x, number of the series, name), broken where the picture ends."""
    rows: list[list[tuple[float, int, str]]] = [[]]
    x = float(_LEFT)
    for number, name in enumerate(names):
        width = 54 + text_width(name) + 50
        if rows[-1] and x + width > _WIDTH - 40:
            rows.append([])
            x = float(_LEFT)
        rows[-1].append((x, number, name))
        x += width
    return rows


def _color(number: int) -> Color:
    return _COLORS[number % len(_COLORS)]
