"""Words that follow a number, in every sentence that mapconv prints."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """``1 module``, ``2 modules``, ``1,000 modules``; ``noun`` is the singular of a regular one."""
    return f"{number:,} {noun if number == 1 else f'{noun}s'}"
