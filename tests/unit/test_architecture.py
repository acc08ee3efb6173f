"""Dependencies point one way, as the design says; and the command line loads nothing heavy when it is imported."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import mapconv

ROOT = Path(mapconv.__file__).parent
HEAVY = {"torch", "transformers", "peft", "safetensors", "huggingface_hub", "numpy"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def imports(name: str, *, only_when_loaded: bool = False) -> set[str]:
    """The modules that a file imports; those in functions and under TYPE_CHECKING do not run when it is loaded."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports are absolute in this package"
            # `from package import name` may mean a module or a value of the package.
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in FILES else node.module)
        elif only_when_loaded and _is_deferred(node):
            return
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(FILES[name].read_text(encoding="utf-8")))
    return found


def _is_deferred(node: ast.AST) -> bool:
    """A function's body, or imports that only a type checker sees."""
    if isinstance(node, ast.If):
        return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def loaded_with(name: str) -> set[str]:
    """All modules that importing one of ours brings in: its packages, and what each of those imports."""
    seen: set[str] = set()
    waiting = {name}
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        if current in FILES:
            parents = {current.rsplit(".", depth)[0] for depth in range(1, current.count(".") + 1)}
            waiting |= parents | imports(current, only_when_loaded=True)
    return seen


ALGEBRA = [name for name in FILES if inside(name, "mapconv.algebra")]
CLI = [name for name in FILES if inside(name, "mapconv.cli")]
#: Who may not import whom: (importer, imported).
FORBIDDEN = [
    ("mapconv.formats", ("mapconv.commands", "mapconv.cli", "mapconv.plan", "mapconv.placement", "mapconv.convert")),
    ("mapconv.checkpoint", ("mapconv.commands", "mapconv.cli", "mapconv.plan", "mapconv.formats", "mapconv.algebra")),
    ("mapconv.placement", ("mapconv.commands", "mapconv.cli", "mapconv.plan", "mapconv.formats", "mapconv.checkpoint")),
    ("mapconv.plan", ("mapconv.commands", "mapconv.cli", "mapconv.convert")),
    ("mapconv.convert", ("mapconv.commands", "mapconv.cli")),
    ("mapconv.data", ("mapconv.commands", "mapconv.cli", "mapconv.training", "mapconv.calibration", "mapconv.nn")),
    ("mapconv.training", ("mapconv.commands", "mapconv.cli", "mapconv.calibration")),
    ("mapconv.calibration", ("mapconv.commands", "mapconv.cli")),
    (
        "mapconv.adapter",
        ("mapconv.commands", "mapconv.cli", "mapconv.formats", "mapconv.checkpoint", "mapconv.algebra"),
    ),
    ("mapconv.commands", ("mapconv.cli", "click")),
]


def test_the_walk_sees_the_package():
    """Or every test below would pass on nothing."""
    assert {"mapconv", "mapconv.cli.merge", "mapconv.algebra.refit", "mapconv.checkpoint.index"} <= FILES.keys()
    assert "mapconv.algebra.norms" in imports("mapconv.algebra.dora")
    assert "torch" in loaded_with("mapconv.commands.merge")
    assert "mapconv.commands.merge" in imports("mapconv.cli.merge")
    assert "mapconv.commands.merge" not in imports("mapconv.cli.merge", only_when_loaded=True)


@pytest.mark.parametrize("name", ALGEBRA)
def test_algebra_imports_torch_and_itself_alone(name):
    others = {
        module
        for module in imports(name)
        if not inside(module, "mapconv.algebra") and module.partition(".")[0] not in sys.stdlib_module_names | {"torch"}
    }
    assert others == set()


@pytest.mark.parametrize("name", ALGEBRA)
def test_algebra_touches_no_files_and_no_logs(name):
    assert not imports(name) & {"os", "pathlib", "logging", "io", "json", "sys", "random", "warnings"}


@pytest.mark.parametrize(("importer", "imported"), FORBIDDEN, ids=[importer for importer, _ in FORBIDDEN])
def test_dependencies_point_one_way(importer, imported):
    names = [name for name in FILES if inside(name, importer)]
    assert names
    against = {
        (name, module) for name in names for module in imports(name) for package in imported if inside(module, package)
    }
    assert against == set()


def test_no_module_imports_the_command_line_but_its_own_entry_points():
    users = {name for name in FILES if any(inside(module, "mapconv.cli") for module in imports(name))}
    assert users <= {*CLI, "mapconv.__main__"}


@pytest.mark.parametrize("name", ["mapconv", "mapconv.__main__", "mapconv.errors", *CLI])
def test_the_command_line_loads_nothing_heavy(name):
    assert {module.partition(".")[0] for module in loaded_with(name)} & HEAVY == set()


def test_files_stay_short():
    """A file has one subject: past 300 lines there are two."""
    tests = Path(__file__).parents[1]
    sizes = {path.name: len(path.read_text().splitlines()) for path in [*FILES.values(), *tests.rglob("*.py")]}
    assert {name: size for name, size in sizes.items() if size > 300} == {}
