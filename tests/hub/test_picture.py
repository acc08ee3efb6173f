"""The plot of a model card, decoded again: a PNG by its own rules, with each series where its values say."""

from __future__ import annotations

import math
import struct
import zlib
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mapconv.adapter import MapModule
from mapconv.publishing.picture import nice_ticks, scalars_png
from mapconv.publishing.raster import Canvas


def decode(png: bytes) -> np.ndarray:
    """(height, width, 3) of an 8-bit RGB picture without filters; every checksum is checked."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    position, data, size = 8, b"", None
    while position < len(png):
        (length,) = struct.unpack_from(">I", png, position)
        kind, body = png[position + 4 : position + 8], png[position + 8 : position + 8 + length]
        assert struct.unpack_from(">I", png, position + 8 + length)[0] == zlib.crc32(kind + body)
        if kind == b"IHDR":
            width, height, depth, color, *rest = struct.unpack(">IIBBBBB", body)
            assert (depth, color, rest) == (8, 2, [0, 0, 0])
            size = height, width
        data += body if kind == b"IDAT" else b""
        position += 12 + length
    assert kind == b"IEND"
    rows = np.frombuffer(zlib.decompress(data), dtype=np.uint8).reshape(size[0], 1 + 3 * size[1])
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(*size, 3)


def module(path: str, gain: float, ratio: float) -> MapModule:
    return MapModule(
        path, "low-rank", 4, alpha=gain * 2.0, beta=ratio * gain * 2.0, base_norm=2.0, direction_norm=1.0, error=0.0
    )


def test_lines_dots_and_text_land_where_they_should():
    canvas = Canvas(100, 60)
    canvas.polyline([(10, 30), (90, 30)], (255, 0, 0), 4)
    canvas.dots([(50, 10)], (0, 0, 255), 5)
    canvas.text(10, 50, "Il", color=(0, 0, 0))
    pixels = decode(canvas.png()).astype(int)
    assert (pixels[30, 20:80] == [255, 0, 0]).all()
    assert (pixels[30, :7] == 255).all()
    assert (pixels[10, 50] == [0, 0, 255]).all()
    assert (pixels[2, 50] == 255).all()
    assert pixels[42:58, 10:40].min() < 60
    assert pixels[42:58, 60:].min() == 255


def test_drawing_over_the_edge_is_cut_off():
    canvas = Canvas(20, 20)
    canvas.polyline([(-50, 10), (70, 10)], (0, 0, 0), 2)
    canvas.dots([(-100, -100), (19, 19)], (0, 0, 0), 3)
    pixels = decode(canvas.png())
    assert (pixels[10] < 255).all()
    assert (pixels[2] == 255).all()


def test_the_highest_series_is_drawn_highest():
    modules = [
        module(f"model.layers.{n}.{name}", gain, 0.1) for n in range(3) for name, gain in (("q", 0.9), ("v", 1.1))
    ]
    pixels = decode(scalars_png(modules)).astype(int)
    height, width, _ = pixels.shape
    plot = pixels[: height - 130, : width // 2]
    blue = np.argwhere((plot[:, :, 2] > 150) & (plot[:, :, 0] < 60))
    orange = np.argwhere((plot[:, :, 0] > 180) & (plot[:, :, 2] < 60))
    assert len(blue) > 0
    assert len(orange) > 0
    assert orange[:, 0].max() < blue[:, 0].min()


def test_modules_without_a_layer_give_no_picture():
    assert scalars_png([module("lm_head", 1.0, 0.1)]) is None
    assert scalars_png([]) is None


@given(st.floats(-1e3, 1e3), st.floats(0, 1e3))
def test_ticks_are_few_round_and_enclose_the_values(low, spread):
    high = low + spread
    ticks = nice_ticks(low, high, around=1.0)
    assert 2 <= len(ticks) <= 9
    step = ticks[1] - ticks[0]
    assert ticks[0] <= low + 1e-6 * step
    assert ticks[-1] >= high - 1e-6 * step
    assert all(b - a == pytest.approx(step) for a, b in pairwise(ticks))
    assert round(step / 10 ** math.floor(math.log10(step) + 1e-9), 6) in (1, 2, 5)
