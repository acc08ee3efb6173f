"""A small anti-aliased canvas that becomes a PNG: lines, dots and text, with numpy and zlib alone.

A model card's picture has to be a PNG (the Hub shows those everywhere, SVG not), and one chart is not a reason to make
every user of mapconv install a plotting library. Text is drawn as strokes through the lit pixels of a 5×7 font.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np

Point = tuple[float, float]
Segment = tuple[Point, Point]
Color = tuple[int, int, int]

#: Width of a character and the space after it, in units of a font pixel.
_ADVANCE = 6.2
#: Pixels around a glyph that its strokes' width may reach into.
_MARGIN = 4


class Canvas:
    """White to begin with; coordinates in pixels from the top left, later strokes over earlier ones."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self._pixels = np.full((height, width, 3), 255.0, dtype=np.float32)

    def lines(self, segments: Sequence[Segment], color: Color, width: float, opacity: float = 1.0) -> None:
        """Segments with round ends, blended as one shape."""
        xs, ys = zip(*(point for segment in segments for point in segment), strict=True)
        reach = width / 2 + 1
        left, right = int(max(min(xs) - reach, 0)), int(min(max(xs) + reach + 1, self.width))
        top, bottom = int(max(min(ys) - reach, 0)), int(min(max(ys) + reach + 1, self.height))
        mask = np.zeros((max(bottom - top, 0), max(right - left, 0)), dtype=np.float32)
        _cover(mask, [((x0 - left, y0 - top), (x1 - left, y1 - top)) for (x0, y0), (x1, y1) in segments], width)
        self._paint(mask * opacity, left, top, color)

    def polyline(self, points: Sequence[Point], color: Color, width: float, opacity: float = 1.0) -> None:
        self.lines(list(pairwise(points)), color, width, opacity)

    def dots(self, points: Sequence[Point], color: Color, radius: float) -> None:
        self.lines([(point, point) for point in points], color, 2 * radius)

    def text(
        self, x: float, y: float, text: str, *, unit: float = 2.6, color: Color = (60, 60, 60), align: str = "left"
    ) -> None:
        """One line of text whose vertical middle is at ``y``; ``unit`` is the size of a font pixel."""
        x -= {"left": 0.0, "center": 0.5, "right": 1.0}[align] * text_width(text, unit)
        for position, character in enumerate(text):
            left = round(x + position * _ADVANCE * unit) - _MARGIN
            self._paint(_glyph(character, unit), left, round(y - 3 * unit) - _MARGIN, color)

    def png(self) -> bytes:
        # 32 levels a channel are enough for edges, and halve the file.
        pixels = (np.rint(self._pixels * (31 / 255)) * (255 / 31)).astype(np.uint8).reshape(self.height, -1)
        rows = np.concatenate([np.zeros((self.height, 1), dtype=np.uint8), pixels], axis=1)
        header = struct.pack(">IIBBBBB", self.width, self.height, 8, 2, 0, 0, 0)
        body = zlib.compress(rows.tobytes(), 6)
        chunks = _chunk(b"IHDR", header) + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")
        return b"\x89PNG\r\n\x1a\n" + chunks

    def _paint(self, mask: np.ndarray, left: int, top: int, color: Color) -> None:
        """Blend ``color`` in, as far as ``mask`` says for each pixel; what lies outside of the canvas is cut off."""
        mask = mask[max(-top, 0) :, max(-left, 0) :]
        top, left = max(top, 0), max(left, 0)
        pixels = self._pixels[top : top + mask.shape[0], left : left + mask.shape[1]]
        mask = mask[: pixels.shape[0], : pixels.shape[1]]
        touched = mask > 0  # most of a line's bounding box is not
        pixels[touched] += mask[touched][:, None] * (np.array(color, dtype=np.float32) - pixels[touched])


def text_width(text: str, unit: float = 2.6) -> float:
    return max(len(text) * _ADVANCE - (_ADVANCE - 4), 0) * unit


def _cover(mask: np.ndarray, segments: Sequence[Segment], width: float) -> None:
    """Raise each pixel of ``mask`` to the part of it that a stroke of ``width`` along the segments covers."""
    reach = width / 2 + 1
    for (x0, y0), (x1, y1) in segments:
        left, top = int(max(min(x0, x1) - reach, 0)), int(max(min(y0, y1) - reach, 0))
        part = mask[top : int(max(y0, y1) + reach + 1), left : int(max(x0, x1) + reach + 1)]
        if not part.size:
            continue
        ys = np.arange(top, top + part.shape[0], dtype=np.float32)[:, None] + (0.5 - y0)
        xs = np.arange(left, left + part.shape[1], dtype=np.float32)[None, :] + (0.5 - x0)
        dx, dy = x1 - x0, y1 - y0
        length = dx * dx + dy * dy
        along = np.clip((xs * dx + ys * dy) / length, 0, 1) if length else 0.0
        distance = np.hypot(xs - along * dx, ys - along * dy)
        np.maximum(part, np.clip(width / 2 + 0.5 - distance, 0, 1), out=part)


@lru_cache(maxsize=512)
def _glyph(character: str, unit: float) -> np.ndarray:
    """The coverage of one character, with ``_MARGIN`` pixels around its 5×8 font pixels."""
    mask = np.zeros((round(8 * unit) + 2 * _MARGIN, round(5 * unit) + 2 * _MARGIN), dtype=np.float32)
    strokes = [
        ((x0 * unit + _MARGIN, y0 * unit + _MARGIN), (x1 * unit + _MARGIN, y1 * unit + _MARGIN))
        for (x0, y0), (x1, y1) in _strokes(character)
    ]
    _cover(mask, strokes, 0.85 * unit)
    return mask


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _strokes(character: str) -> list[Segment]:
    """Segments between the lit pixels of a character: to the right, down, and along diagonals that stand alone."""
    columns = bytes.fromhex(_FONT.get(character, _FONT["?"]))
    lit = {(column, row) for column in range(5) for row in range(8) if columns[column] >> row & 1}
    segments = []
    for column, row in sorted(lit):
        linked = False
        for neighbour in ((column + 1, row), (column, row + 1)):
            if neighbour in lit:
                segments.append(((column, row), neighbour))
                linked = True
        for step in (1, -1):
            corner = (column + 1, row + step)
            if corner in lit and (column + 1, row) not in lit and (column, row + step) not in lit:
                segments.append(((column, row), corner))
                linked = True
        if not linked:
            segments.append(((column, row), (column, row)))
    return segments


#: The common 5×7 matrix font from space to tilde: five columns a character, the lowest bit on top.
_MATRIX = """
0000000000 00005f0000 0007000700 147f147f14 242a7f2a12 2313086462 3649552250 0005030000 001c224100 0041221c00
082a1c2a08 08083e0808 0050300000 0808080808 0060600000 2010080402 3e5149453e 00427f4000 4261514946 2141454b31
1814127f10 2745454539 3c4a494930 0171090503 3649494936 064949291e 0036360000 0056360000 0008142241 1414141414
4122140800 0201510906 324979413e 7e1111117e 7f49494936 3e41414122 7f4141221c 7f49494941 7f09090101 3e41415132
7f0808087f 00417f4100 2040413f01 7f08142241 7f40404040 7f0204027f 7f0408107f 3e4141413e 7f09090906 3e4151215e
7f09192946 4649494931 01017f0101 3f4040403f 1f2040201f 7f2018207f 6314081463 0304780403 6151494543 00007f4141
0204081020 41417f0000 0402010204 4040404040 0001020400 2054545478 7f48444438 3844444420 384444487f 3854545418
087e090102 18a4a4a47c 7f08040478 00447d4000 2040443d00 007f102844 00417f4000 7c04180478 7c08040478 3844444438
fc24242418 18242424fc 7c08040408 4854545420 043f444020 3c4040207c 1c2040201c 3c4030403c 4428102844 1ca0a0a07c
4464544c44 0008364100 00007f0000 0041360800 0804081008
"""
_FONT = {chr(code): columns for code, columns in enumerate(_MATRIX.split(), ord(" "))}
_FONT |= {"α": "3844443844", "β": "fe25252a10", "‖": "007f007f00"}
