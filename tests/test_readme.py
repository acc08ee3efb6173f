"""What the documents take from the program is what the program says: generated parts are generated afresh."""

from __future__ import annotations

import re
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


def test_the_readme_is_short_and_its_links_lead_somewhere():
    pages = [README, ROOT / "examples" / "README.md", ROOT / "examples" / "benchmarks" / "README.md"]
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 350
    for page in pages:
        for link in re.findall(r"\]\(([^)#:]*)(#[^)]*)?\)", page.read_text(encoding="utf-8")):
            target = page.parent / link[0] if link[0] else page
            assert target.exists(), (page, link)
            assert not link[1] or link[1][1:] in _anchors(target), (page, link)


def test_every_command_is_in_the_readme_and_every_benchmark_in_its_list():
    table = README.read_text(encoding="utf-8").partition("\n## Commands\n")[2].partition("\n## ")[0]
    for name in COMMANDS:
        assert f"`{name}" in table, name
    folder = ROOT / "examples" / "benchmarks"
    listed = (folder / "README.md").read_text(encoding="utf-8").partition("\n## ")[0]
    for path in folder.glob("*.py"):
        is_script = '__name__ == "__main__"' in path.read_text(encoding="utf-8")
        assert not is_script or f"`{path.name}`" in listed, path


def _anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}
