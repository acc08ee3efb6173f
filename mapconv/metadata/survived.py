"""What survives of an update in a merged model's stored weights, in words: for the model card and the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mapconv.metadata.markdown import number, share, table
from mapconv.untrusted.printable import markdown_code

#: The numbers of a record's ``survival``, and what they are.
MEASURES = {
    "projection": "The part of the update that is in the stored weights: 1 is all of it, 0 none.",
    "changed": "The share of the stored values that are no longer the base's.",
    "error": "What storing adds to the update or takes from it, in units of the update: 0 is exact.",
}


def survival_table(survival: Mapping[str, Any]) -> str:
    """Markdown of a record that ``formats.mapdir`` has read, or that was just measured."""
    tensors = survival["tensors"]
    head, rows = ("weights", "update that survives", "values changed", "ε"), [_row("all that were merged", survival)]
    if len(tensors) > 1:
        least = min(tensors, key=lambda item: item["projection"])
        rows.append(_row(f"least of {len(tensors)}: {markdown_code(least['tensor'])}", least))
    dtypes = ", ".join(dict.fromkeys(markdown_code(item["dtype"]) for item in tensors))
    about = (
        f"Measured on the values as they were written, in {dtypes}. An update of 1.000 survives whole; ε is what "
        "storing changes besides, as a share of the update. A large weight is measured on a part of its values, an "
        "eighth or more, which lie in every row and column."
    )
    return f"{table(head, rows)}\n\n{about}"


def _row(name: str, part: Mapping[str, Any]) -> tuple[str, str, str, str]:
    return name, f"{part['projection']:.3f}", share(part["changed"]), number(part["error"])
