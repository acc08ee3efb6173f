"""A LoRA that every server reads differently."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models import save_adapter


@pytest.fixture(scope="session")
def uneven(models: Path, base: Path) -> Path:
    """A LoRA with all that servers read differently: rsLoRA, patterns, a regular expression."""
    return save_adapter(
        base,
        models / "uneven",
        use_rslora=True,
        rank_pattern={"v_proj": 7},
        alpha_pattern={"down_proj": 3.0},
        target_modules=r".*\.(q_proj|v_proj|down_proj)",
    )
