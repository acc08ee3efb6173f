"""``mapconv inspect``."""

from __future__ import annotations

import click

from mapconv.cli import options
from mapconv.cli.output import notes, print_json, print_table, size
from mapconv.hub.reference import shown
from mapconv.wording import counted


@click.command("inspect", short_help="Say what an adapter is, and what upgrade would do.")
@click.argument("source", type=options.SOURCE)
@options.base
@options.allow_pickle
@options.as_json
def command(source: str, base: str | None, allow_pickle: bool, as_json: bool) -> None:
    """Say what the adapter in SOURCE is, and what `mapconv upgrade` would do with it.

    With --base, every tensor is also placed on the base model, from names and shapes alone.
    """
    from mapconv.commands.inspect import inspect

    found = inspect(source, base=base, allow_pickle=allow_pickle)
    if as_json:
        print_json(found.to_dict())
        return
    click.echo(
        f"{source}: {found.method} adapter, {counted(found.modules, 'module')}, "
        f"{counted(found.parameters, 'parameter')}, "
        f"{size(found.nbytes)} of {'/'.join(found.dtypes)}"
    )
    click.echo(f"  base      {found.base or 'not recorded'}{f' @ {found.revision}' if found.revision else ''}")
    if found.fits is not None:
        click.echo(f"  placed    every tensor fits {shown(found.fits)}")
    if found.task_type:
        click.echo(f"  task      {found.task_type}")
    if found.peft_version:
        click.echo(f"  written   by PEFT {found.peft_version}")
    click.echo(f"  upgrade   {found.upgrade}")
    click.echo()
    print_table(
        ["target", "modules", "layers", "rank", "scaling", "weight", "parameters"],
        [
            [
                group.module_type,
                str(group.count),
                group.layers or "-",
                _list(group.ranks),
                _list(f"{scaling:.4g}" for scaling in group.scalings),
                _list("×".join(map(str, shape)) for shape in group.shapes),
                f"{group.parameters:,}",
            ]
            for group in found.targets
        ],
    )
    if found.whole_tensors:
        click.echo()
        click.echo(f"  whole tensors   {', '.join(found.whole_tensors)}")
    notes(found.notes)


def _list(values) -> str:
    return ", ".join(str(value) for value in values)
