"""Texts that ship with the package."""

from __future__ import annotations

from importlib.resources import files


def packaged_text(name: str) -> str:
    """A text that ships with mapconv."""
    return (files("mapconv.data") / "texts" / name).read_text(encoding="utf-8")
