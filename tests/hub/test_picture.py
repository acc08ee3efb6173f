"""The plot of a model card: each series where its values say, in the figure and in the picture."""

from __future__ import annotations

import importlib.util
import io

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from mapconv.adapter import MapModule
from mapconv.publishing import picture
from mapconv.publishing.package import _plot


def module(path: str, gain: float, ratio: float) -> MapModule:
    return MapModule(
        path, "low-rank", 4, alpha=gain * 2.0, beta=ratio * gain * 2.0, base_norm=2.0, direction_norm=1.0, error=0.0
    )


MODULES = [module(f"model.layers.{n}.{name}", gain, 0.1) for n in range(3) for name, gain in (("q", 0.9), ("v", 1.1))]


@pytest.fixture
def drawn(monkeypatch) -> Figure:
    """The figure of ``MODULES``, before it becomes a picture."""
    figure = Figure()

    def draw_on_it(width, height, draw):
        draw(figure)
        return b"png"

    monkeypatch.setattr(picture, "figure_png", draw_on_it)
    assert picture.scalars_png(MODULES) == b"png"
    return figure


def test_each_series_has_its_values_and_its_name(drawn):
    gains, ratios = drawn.axes
    for axis, values in ((gains, (0.9, 1.1)), (ratios, (0.1, 0.1))):
        assert [list(line.get_xdata()) for line in axis.get_lines()] == [[0, 1, 2]] * 2
        for line, value in zip(axis.get_lines(), values, strict=True):
            assert list(line.get_ydata()) == pytest.approx([value] * 3)
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == ["q", "v"]


def test_values_that_hardly_differ_are_drawn_as_one(drawn):
    low, high = drawn.axes[1].get_ylim()
    assert (low, high) == pytest.approx((0.09, 0.11))


def test_the_highest_series_is_drawn_highest_and_the_bytes_repeat():
    png = picture.scalars_png(MODULES)
    assert png == picture.scalars_png(MODULES)
    pixels = (imread(io.BytesIO(png)) * 255).astype(int)
    height, width, _ = pixels.shape
    assert (width, height) == (1600, 720)
    plot = pixels[: height * 4 // 5, : width // 2]
    blue = (plot[:, :, 2] > 150) & (plot[:, :, 0] < 60)
    orange = (plot[:, :, 0] > 180) & (plot[:, :, 2] < 60)
    assert blue.any()
    assert orange.any()
    assert orange.any(axis=1).nonzero()[0].max() < blue.any(axis=1).nonzero()[0].min()


def test_modules_without_a_layer_give_no_picture():
    assert picture.scalars_png([module("lm_head", 1.0, 0.1)]) is None
    assert picture.scalars_png([]) is None


def test_without_matplotlib_the_card_has_its_table_alone(monkeypatch, tmp_path):
    assert _plot(tmp_path, MODULES) is not None
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "mapconv.publishing.package.find_spec", lambda name: None if name == "matplotlib" else found(name)
    )
    assert _plot(tmp_path, MODULES) is None
