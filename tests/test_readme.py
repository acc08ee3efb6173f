"""The README says what the program says: its generated parts are compared with a fresh generation."""

from __future__ import annotations

from pathlib import Path

from mapconv.cli.reference import with_reference
from tests.matrix.support import with_support

README = Path(__file__).parents[1] / "README.md"


def test_the_command_reference_is_fresh():
    text = README.read_text(encoding="utf-8")
    assert text == with_reference(text), "run: python -m mapconv.cli.reference README.md"


def test_the_support_table_is_fresh():
    text = README.read_text(encoding="utf-8")
    assert text == with_support(text), "run: python -m tests.matrix.support README.md"
