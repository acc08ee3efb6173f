"""``mapconv inspect``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mapconv.cli.options import Chosen, command
from mapconv.cli.output import notes, print_json, print_table, show
from mapconv.hub.reference import shown
from mapconv.options.commands import INSPECT
from mapconv.wording import NONE, counted, size

if TYPE_CHECKING:
    from mapconv.commands.inspect import Inspection


@command(INSPECT, "Describe an adapter, and what upgrade would do.")
def inspect(chosen: Chosen) -> None:
    """Describe the adapter in SOURCE, and what `mapconv upgrade` would do with it.

    With --base, every tensor is also placed on the base model, from names and shapes alone.
    """
    from mapconv.commands.inspect import inspect

    found = inspect(**chosen.arguments)
    if chosen["as_json"]:
        print_json(found.to_dict())
        return
    show(
        f"{chosen['source']}: {found.method} adapter, {counted(found.modules, 'module')}, "
        f"{counted(found.parameters, 'parameter')}, "
        f"{size(found.nbytes)} of {'/'.join(found.dtypes)}"
    )
    if found.components:
        show(f"  written   as {found.dialect} does; adapts {', '.join(found.components)}")
    show(f"  base      {found.base or 'not recorded'}{f' @ {found.revision}' if found.revision else ''}")
    if found.origin:
        show(f"  made      from {found.origin}")
    if found.fits is not None:
        show(f"  placed    every tensor fits {shown(found.fits)}")
    if found.storages:
        stored = ", ".join(f"{counted(count, 'weight')} as {label}" for label, count in found.storages.items())
        show(f"  stored    {stored}")
    if found.task_type:
        show(f"  task      {found.task_type}")
    if found.written_by:
        show(f"  written   by {found.written_by}")
    if found.dora:
        show(f"  magnitude {found.dora}")
    show(f"  upgrade   {found.upgrade}")
    if found.targets:
        show()
        _print_targets(found)
    if found.whole_tensors:
        show()
        show(f"  whole tensors   {', '.join(found.whole_tensors)}")
    notes(found.notes)


def _print_targets(found: Inspection) -> None:
    print_table(
        ["target", "modules", "layers", "rank", "scaling", "weight", "parameters"],
        [
            [
                group.module_type,
                str(group.count),
                group.layers or NONE,
                _list(group.ranks),
                _list(f"{scaling:.4g}" for scaling in group.scalings),
                _list("×".join(map(str, shape)) for shape in group.shapes),
                f"{group.parameters:,}",
            ]
            for group in found.targets
        ],
    )


def _list(values) -> str:
    return ", ".join(str(value) for value in values) or "-"
