"""One HTML file with all that it needs inside; its own policy forbids the browser any request."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from importlib import resources

from mapconv.reporting.datatable import DataTable
from mapconv.reporting.markup import Html, element, escape, script_data
from mapconv.reporting.scales import palette_css
from mapconv.untrusted.printable import page_text
from mapconv.version import __version__


def build_page(title: str, lead: Html, sections: Sequence[Html], tables: Sequence[DataTable]) -> str:
    """The whole page: ``lead`` stands below the title, and ``tables`` are the data of those that sections hold."""
    script = _asset("report.js") + _asset("tables.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = {
        # Nothing is loaded from anywhere, and no script runs but this page's own.
        "policy": (
            f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:; "
            "base-uri 'none'; form-action 'none'"
        ),
        "version": escape(__version__),
        "title": escape(title),
        "style": palette_css() + _asset("report.css"),
        "lead": lead,
        "content": "\n".join(sections),
        "data": script_data({table.key: table.to_json() for table in tables}),
        "script": script,
    }
    # One pass: what a part brings in is never searched for marks again.
    return re.sub(r"\{\{(\w+)\}\}", lambda mark: parts[mark[1]], _asset("report.html"))


def section(key: str, title: str, *children: object) -> Html:
    return element(
        "section", element("h2", title, id=f"{key}-title"), *children, id=key, aria_labelledby=f"{key}-title"
    )


def tiles(facts: Sequence[tuple[str, str, str]]) -> Html:
    """Large numbers: (what, number, a word more)."""
    items = (
        element("div", element("dt", what), element("dd", said, element("small", more) if more else None))
        for what, said, more in facts
    )
    return element("dl", *items, class_="tiles")


def definitions(rows: Sequence[tuple[str, object]]) -> Html:
    """A list of names and values, which break anywhere: most are paths and hashes."""
    items = (element("div", element("dt", name), element("dd", value)) for name, value in rows)
    return element("dl", *items, class_="facts")


def _asset(name: str) -> str:
    return page_text((resources.files("mapconv.reporting") / "assets" / name).read_text(encoding="utf-8"))
