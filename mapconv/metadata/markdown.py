"""Pieces of Markdown that model cards are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mapconv.untrusted.printable import markdown_text
from mapconv.wording import fixed, is_finite, percent, small


def python_code(head: str, *parts: str) -> str:
    code = "\n\n".join(parts)
    return f"{head}\n\n```python\n{code}\n```"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float | None) -> str:
    """A measured number from a record, in which null stands for what is not finite."""
    return small(value) if is_finite(value) else "not finite"


def share(value: float | None) -> str:
    """The same of a share of 1."""
    return percent(value) if is_finite(value) else "not finite"


def calibration_table(record: Mapping[str, Any]) -> str:
    rows = [
        (
            markdown_text(name),
            fixed(numbers.get("perplexity")),
            number(numbers.get("kl")),
            share(numbers.get("top1_agreement")),
        )
        for name, numbers in record["models"].items()
    ]
    scalars = ["β"] if record.get("hold_gain") else ["α", "β"]
    what = " and ".join(scalars) if record["train"] == "scalars" else f"{', '.join(scalars)} and the factors"
    goal = "the source's distribution" if record["objective"] == "distill" else "the data's own labels"
    return (
        f"{table(('model', 'perplexity', 'KL(source ‖ model)', 'top-1 as the source'), rows)}\n\n"
        f"mapconv trained {what} ({record['trained_parameters']:,} numbers) towards {goal} for "
        f"{record['steps']} steps, and kept step {record['best_step']}. Measured in float32 on the files as they are, "
        f"at {record['held_out_positions']:,} positions of text that was held out."
    )
