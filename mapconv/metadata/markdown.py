"""Pieces of Markdown that model cards are made of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mapconv.untrusted.printable import markdown_text


def python_code(head: str, *parts: str) -> str:
    code = "\n\n".join(parts)
    return f"{head}\n\n```python\n{code}\n```"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def value_range(values: Sequence[float], form: str) -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} … {high}"


def worst(errors: Sequence[float]) -> str:
    return number(max(errors)) if errors else "-"


def number(value: float | None) -> str:
    if value is None or not math.isfinite(value):  # JSON has no NaN
        return "not finite"
    if value == 0:
        return "0"
    return f"{value:.4f}" if abs(value) >= 0.001 else f"{value:.1e}"


def percent(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.2%}"


def calibration_table(record: Mapping[str, Any]) -> str:
    rows = [
        (
            markdown_text(name),
            "-" if numbers.get("perplexity") is None else f"{numbers['perplexity']:.4f}",
            number(numbers.get("kl")),
            percent(numbers.get("top1_agreement")),
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
