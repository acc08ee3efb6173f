"""``mapconv env``."""

from __future__ import annotations

from mapconv.cli.options import Chosen, command
from mapconv.cli.output import print_json, show
from mapconv.options.commands import ENV


@command(ENV, "Show versions, devices and cache folders, for bug reports.")
def env(chosen: Chosen) -> None:
    """Show the versions, devices and cache folders that mapconv works with: paste this into a bug report."""
    from mapconv.commands.env import environment

    found = environment()
    if chosen["as_json"]:
        print_json(found)
        return
    width = max(map(len, found))
    for name, value in found.items():
        show(f"{name.ljust(width)}  {value}")
