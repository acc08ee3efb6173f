"""Where each module of an adapter stands on a map: a row for its type, a column for its layer."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mapconv.adapter import layer_of

#: Names of a transformer's layers, in the order in which it runs them.
_FORWARD = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj")


@dataclass(frozen=True)
class Layout:
    """``members[row, column]`` are the modules there, by number: several where experts share a layer and a type.

    ``layers`` ends with None where there are modules without a layer number.
    """

    types: tuple[str, ...]
    layers: tuple[int | None, ...]
    members: Mapping[tuple[int, int], tuple[int, ...]]

    def name(self, row: int, column: int) -> str:
        layer = self.layers[column]
        return f"{self.types[row]}, {'no layer' if layer is None else f'layer {layer}'}"


def lay_out(paths: Sequence[str]) -> Layout:
    """Types in the order of a forward pass where their names are known, others as they come after them; layers by
    number, and those between the first and the last that have no module too."""
    templates = [_template(path) for path in paths]
    layers = [layer_of(path) for path in paths]
    known = sorted({layer for layer in layers if layer is not None})
    # A number far from the others is not a reason for a million columns.
    span = range(known[0], known[-1] + 1) if known and known[-1] - known[0] < 4 * len(known) + 64 else known
    columns: tuple[int | None, ...] = (*span, *((None,) if None in layers else ()))
    rows = sorted(dict.fromkeys(templates), key=_familiar)
    row_of, column_of = ({name: number for number, name in enumerate(names)} for names in (rows, columns))
    members: dict[tuple[int, int], list[int]] = defaultdict(list)
    for number, (template, layer) in enumerate(zip(templates, layers, strict=True)):
        members[row_of[template], column_of[layer]].append(number)
    return Layout(_short_names(rows), columns, {place: tuple(found) for place, found in members.items()})


def _familiar(template: str) -> int:
    name = template.rpartition(".")[2]
    return _FORWARD.index(name) if name in _FORWARD else len(_FORWARD)


def _template(path: str) -> str:
    """The path with ``*`` for its numbers: the modules that differ in nothing else are of one type."""
    return ".".join("*" if part.isdecimal() else part for part in path.split("."))


def _short_names(templates: Sequence[str]) -> tuple[str, ...]:
    """Of each type as many last parts as no other type ends with."""
    endings = Counter(
        ending for template in templates for ending in {_ending(template, n) for n in range(1, template.count(".") + 2)}
    )
    return tuple(
        next(
            (
                ending
                for n in range(1, name.count(".") + 1)
                if endings[ending := _ending(name, n)] == 1 and ending != "*"
            ),
            name,
        )
        for name in templates
    )


def _ending(template: str, parts: int) -> str:
    return ".".join(template.split(".")[-parts:])
