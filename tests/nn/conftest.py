"""A MAP directory for live models, made once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

import mapconv


@pytest.fixture(scope="session")
def map_dir(models: Path, base: Path, dora: Path) -> Path:
    """The DoRA adapter refitted: every a differs from 1."""
    mapconv.upgrade(dora, models / "nn-map", base=base)
    return models / "nn-map"
