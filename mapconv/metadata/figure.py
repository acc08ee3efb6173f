"""A matplotlib figure as PNG: the same bytes for the same values (the extra ``report``)."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mapconv.untrusted.printable import page_text

INK = "#1b1d21"
_STYLE: dict[Any, Any] = {
    "font.size": 13,
    "axes.titlesize": 15,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,  # a dollar sign in a name is no formula
    "hatch.linewidth": 0.5,
}


def figure_png(width: int, height: int, draw: Callable[[Figure], None]) -> bytes:
    """What ``draw`` puts on an empty figure of ``width`` × ``height`` pixels."""
    dpi = 120
    file = io.BytesIO()
    with rc_context(_STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a name's script may have no glyphs in the font
        logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
        figure = Figure(figsize=(width / dpi, height / dpi), dpi=dpi, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        draw(figure)
        # No version and no date in the file, so that it depends on nothing but the values. The canvas itself lays out
        # and draws in one pass, where savefig makes two.
        canvas.print_png(file, metadata={"Software": None})
    return file.getvalue()


def short_label(name: str, length: int) -> str:
    """A name as one line that fits."""
    name = " ".join(page_text(name).split())
    return name if len(name) <= length else f"{name[: length - 1]}…"
