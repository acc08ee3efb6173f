"""Dependencies point one way, as the design says; and the command line loads nothing heavy when it is imported."""

from __future__ import annotations

import ast
import sys
from functools import cache
from pathlib import Path

import pytest

import mapconv

ROOT = Path(mapconv.__file__).parent
HEAVY = {"torch", "transformers", "peft", "safetensors", "huggingface_hub", "numpy"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


@cache
def imports(name: str, *, only_when_loaded: bool = False) -> frozenset[str]:
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

    visit(syntax(name))
    return frozenset(found)


@cache
def syntax(name: str) -> ast.AST:
    return ast.parse(FILES[name].read_text(encoding="utf-8"))


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
#: The rooms, lowest first. A file imports from its own room and from the rooms of lower layers, never from a neighbour.
LAYERS = [
    {"errors", "version", "wording"},
    {"untrusted", "files", "spelling"},
    {"options", "adapter", "jsonfile", "algebra"},
    {"checkpoint", "data", "runtime"},
    {"formats", "hub"},
    {"tuners"},
    {"placement"},
    {"metadata", "merging"},
    {"refit", "fidelity", "catalog"},
    {"nn", "reporting", "publishing", "exporting"},
    {"training"},
    {"commands"},
    {"", "__main__", "cli"},  # "" is mapconv/__init__.py, the public door
]
LAYER = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}
#: Imports that climb, each with its reason.
CLIMBING = {
    # Files at the root that are not rooms of their own.
    ("mapconv.__main__", "mapconv.cli"): "the command line's own entry point",
    # An entry of a catalog is the public functions, called in whichever process it runs.
    ("mapconv.catalog.work", "mapconv"): "a job calls the public functions by name",
}


def room_of(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def climbing_imports(graph: dict[str, set[str]]) -> set[tuple[str, str]]:
    """Imports of a higher layer, or of another room of the same one."""
    return {
        (name, module)
        for name, modules in graph.items()
        for module in modules
        if room_of(name) != room_of(module) and LAYER[room_of(module)] >= LAYER[room_of(name)]
    }


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that reach each other: what is left without the ends of all chains."""
    graph = {name: {module for module in modules if module in graph} - {name} for name, modules in graph.items()}
    while True:
        imported = set().union(*graph.values()) if graph else set()
        ends = {name for name, modules in graph.items() if not modules or name not in imported}
        if not ends:
            return [sorted(graph)] if graph else []
        graph = {name: modules - ends for name, modules in graph.items() if name not in ends}


def import_graph() -> dict[str, set[str]]:
    """Every import between our files, wherever in a file it stands, but those that ``CLIMBING`` excuses."""
    return {
        name: {module for module in imports(name) if module in FILES and (name, module) not in CLIMBING}
        for name in FILES
    }


def rooms(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The same graph between rooms."""
    result: dict[str, set[str]] = {}
    for name, modules in graph.items():
        result.setdefault(room_of(name), set()).update(room_of(module) for module in modules)
    return result


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


def test_every_room_has_a_layer():
    assert {room_of(name) for name in FILES} <= LAYER.keys()


def test_imports_point_downwards():
    assert climbing_imports(import_graph()) == set()


def test_there_is_no_import_cycle():
    graph = import_graph()
    assert cycles(graph) == []
    assert cycles(rooms(graph)) == []


def test_the_excused_imports_exist():
    """An excuse that nobody needs any more goes."""
    assert {pair for pair in CLIMBING if pair[1] not in imports(pair[0])} == set()


def test_a_planted_climb_is_seen():
    graph = import_graph()
    graph["mapconv.checkpoint.index"] = graph["mapconv.checkpoint.index"] | {"mapconv.hub.ranges"}
    assert ("mapconv.checkpoint.index", "mapconv.hub.ranges") in climbing_imports(graph)
    neighbour = {"mapconv.formats.peft": {"mapconv.hub.locate"}}
    assert climbing_imports(neighbour) == {("mapconv.formats.peft", "mapconv.hub.locate")}


def test_a_planted_cycle_is_seen():
    graph = import_graph()
    graph["mapconv.checkpoint.index"] = graph["mapconv.checkpoint.index"] | {"mapconv.checkpoint.reader"}
    assert {"mapconv.checkpoint.index", "mapconv.checkpoint.reader"} <= set(cycles(graph)[0])


def test_the_root_stays_small():
    """A new file needs a room."""
    assert len(list(ROOT.glob("*.py"))) <= 9


def test_no_module_imports_the_command_line_but_its_own_entry_points():
    users = {name for name in FILES if any(inside(module, "mapconv.cli") for module in imports(name))}
    assert users <= {*CLI, "mapconv.__main__"}


@pytest.mark.parametrize("name", ["mapconv", "mapconv.__main__", "mapconv.errors", *CLI])
def test_the_command_line_loads_nothing_heavy(name):
    assert {module.partition(".")[0] for module in loaded_with(name)} & HEAVY == set()


def test_files_stay_short():
    """A file has one subject: past 300 lines there are two."""
    tests = Path(__file__).parent
    sizes = {path.name: len(path.read_text().splitlines()) for path in [*FILES.values(), *tests.rglob("*.py")]}
    assert {name: size for name, size in sizes.items() if size > 300} == {}
