"""What a rebase brought, in words: for the model card and the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mapconv.metadata.markdown import number, share, table
from mapconv.wording import fixed

#: The models that were compared with the source on its own base, and what they are.
SERVED_MODELS = {
    "alone": "the base alone",
    "as_is": "the source put on it as it is",
    "rebased": "this adapter",
}


def verdict(served: Mapping[str, Any] | None) -> str:
    """One sentence, from the record of a rebase that ``formats.mapdir`` has read, or that was just measured."""
    if not served:
        return "No text was run, so what the rebase brought was not measured."
    before, after = served["as_is"].get("kl"), served["rebased"].get("kl")
    found = f"KL {number(after)} to the source on its own base, and {number(before)} with the source put on it as it is"
    if not before or not after:
        return f"On this base the adapter has {found}."
    if after <= before:
        return (
            f"On this base the adapter is {before / after:.1f} × closer to its source than the source itself: {found}."
        )
    return (
        f"On this base the adapter is {after / before:.1f} × further from its source than the source itself: {found}."
    )


def rebase_section(rebase: Mapping[str, Any], origin: str, base: str) -> str:
    """What was rebased from where to where, with the measured divergences; ``origin`` and ``base`` are Markdown."""
    served = rebase.get("served")
    made = (
        f"The source was trained on {origin}. `mapconv rebase` fitted this adapter to {base}, so that its layers give "
        f"the outputs that the source gives there. {verdict(served)}"
    )
    if not served:
        return made
    rows = [
        (
            what,
            number(served[name].get("kl")),
            share(served[name].get("top1_agreement")),
            fixed(served[name].get("perplexity")),
        )
        for name, what in SERVED_MODELS.items()
    ]
    head = ("model", "KL(source ‖ model)", "top-1 as the source", "perplexity")
    return f"{made}\n\n{table(head, rows)}\n\nMeasured at {served['positions']:,} positions that the fit did not see."
