"""What the documents take from the program is what the program says: generated parts are generated afresh."""

from __future__ import annotations

from pathlib import Path

from mapconv.cli.reference import reference
from mapconv.options.commands import COMMANDS
from tests.matrix.support import with_support

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def test_the_command_reference_is_fresh():
    path = ROOT / "examples" / "COMMANDS.md"
    found = path.read_text(encoding="utf-8")
    assert found == reference(), f"run: python -m mapconv.cli.reference {path.relative_to(ROOT)}"


def test_the_command_reference_has_every_command_and_its_options():
    text = reference()
    for name, command in COMMANDS.items():
        page = text.partition(f"\n## mapconv {name}\n")[2].partition("\n## ")[0]
        assert page, name
        for option in command.options.values():
            assert option.positional or option.flag in page, (name, option.name)


def test_the_support_table_is_fresh():
    text = README.read_text(encoding="utf-8")
    assert text == with_support(text), "run: python -m tests.matrix.support README.md"
