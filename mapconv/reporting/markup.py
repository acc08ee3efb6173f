"""HTML that nothing can be injected into: every text is escaped unless it was made here."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import markupsafe
from markupsafe import Markup as Html

from mapconv.jsonfile import finite
from mapconv.untrusted.printable import page_text

_VOID = ("br", "input", "meta", "link")


def escape(text: object) -> Html:
    """Any value as HTML text; quotes are escaped too, so that it serves within attributes."""
    return text if isinstance(text, Html) else markupsafe.escape(page_text(str(text)))


def element(name: str, *children: object, **attributes: object) -> Html:
    """``<name attribute="…">children</name>``; children that are not Html are escaped.

    ``class_`` stands for ``class`` and ``aria_label`` for ``aria-label``; an attribute that is None or False is left
    out, and True stands alone.
    """
    words = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        words.append(key if value is True else f'{key}="{markupsafe.escape(page_text(str(value)))}"')
    start = f"<{' '.join(words)}>"
    return Html(start) if name in _VOID else Html(f"{start}{join(children)}</{name}>")


def join(children: Iterable[object]) -> Html:
    return Html("".join(escape(child) for child in children if child is not None))


def script_data(value: Any) -> str:
    """JSON that may stand in a ``<script>``: no ``<`` can end that, and no number is one that JSON does not know."""
    text = json.dumps(finite(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return page_text(text).replace("<", "\\u003c")


def table(head: Iterable[object], rows: Iterable[Iterable[object]], *, caption: str, class_: str = "plain") -> Html:
    """A table whose first column names its rows."""
    top = element("tr", *(element("th", cell, scope="col") for cell in head))
    body = [
        element("tr", element("th", first, scope="row"), *(element("td", cell) for cell in rest))
        for first, *rest in rows
    ]
    parts = element("caption", caption), element("thead", top), element("tbody", *body)
    return element("div", element("table", *parts, class_=class_), class_="wide", tabindex="0")
