"""``mapconv statistics``."""

from __future__ import annotations

from mapconv.cli.options import Chosen, command
from mapconv.cli.output import notes, print_json, show
from mapconv.hub.reference import shown
from mapconv.options.commands import STATISTICS_COMMAND
from mapconv.wording import size


@command(STATISTICS_COMMAND, "Collect a base's layer inputs, for many rebases.")
def statistics(chosen: Chosen) -> None:
    """Run BASE on text and store statistics of its linear layers' inputs, for `mapconv rebase --statistics-from`.

    Adapters of that base are then rebased without running any model.
    """
    from mapconv.commands.statistics import statistics

    result = statistics(**chosen.arguments)
    if chosen["as_json"]:
        print_json(result.to_dict())
    else:
        show(f"{shown(result.base)}: the inputs of {result.layers} layers on {result.tokens:,} tokens")
        show(f"  wrote {result.out}: {size(result.nbytes)}, {result.seconds:.1f} s")
    notes(result.notes)
