"""Where a result came from, as rows of a report."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mapconv.reporting.markup import element
from mapconv.reporting.numbers import text


def origin(name: str, found: Any) -> Iterable[tuple[str, object]]:
    """A base or a source as it was recorded; anything but a table was not."""
    found = found if isinstance(found, dict) else {}
    revision = f" @ {text(found['revision'])}" if found.get("revision") else ""
    method = f" ({text(found['method'])})" if found.get("method") else ""
    yield name, f"{text(found.get('name')) or 'not recorded'}{revision}{method}"
    if found.get("fingerprint"):
        yield f"{name}'s fingerprint", element("code", text(found["fingerprint"]))
