"""``mapconv merge``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mapconv.cli.options import Chosen, command
from mapconv.cli.output import notes, print_json, show
from mapconv.cli.startup import starting
from mapconv.hub.reference import shown
from mapconv.options.commands import MERGE
from mapconv.wording import counted, rough_percent, size

if TYPE_CHECKING:
    from mapconv.commands.merge import MergeResult


@command(MERGE, "Merge an adapter into its base weights.")
def merge(chosen: Chosen) -> None:
    """Merge ADAPTER (a MAP folder, or a LoRA or DoRA adapter as it is) into its base model.

    Several adapters merge together: their updates add up, and a weight adapted by a DoRA cannot be adapted by another.

    The merged model loads with from_pretrained. Weights are computed in float32 and rounded once.
    """
    with starting(chosen["adapters"], chosen["base"], whole_base=True, quiet=chosen["quiet"]):
        from mapconv.commands.merge import merge

    result, dry_run = merge(**chosen.arguments), chosen["dry_run"]
    if chosen["as_json"]:
        print_json(result.to_dict())
    else:
        verb = "would write" if dry_run else "wrote"
        show(f"{' + '.join(map(str, chosen['adapters']))} ({result.method}) + {shown(result.base)}")
        show(
            f"  {verb} {result.out}: {counted(result.tensors, 'tensor')} in "
            f"{counted(len(result.files), 'file')}, {size(result.nbytes)}"
        )
        if result.merged:
            _show_rounding(result, dry_run=dry_run)
        else:
            show("  tensors are replaced, and none is updated")
    notes(result.notes)


def _show_rounding(result: MergeResult, *, dry_run: bool) -> None:
    """What rounding to the base's dtype leaves of the update."""
    worst = max(result.merged, key=lambda item: item.rounding_error)
    verb, changes = ("would be merged", "would change") if dry_run else ("merged", "changes")
    verb_of_values = "would change" if dry_run else "changed"
    show(f"  {counted(len(result.merged), 'tensor')} {verb} in {result.seconds:.1f} s")
    most = rough_percent(worst.rounding_error)
    show(f"  {worst.dtype} rounding {changes} up to {most} of an update (worst: {worst.tensor})")
    kept, least = result.survival, min(result.merged, key=lambda item: item.survival.projection)
    show(
        f"  {kept.projection:.3f} of the update survives (least: {least.survival.projection:.3f}, {least.tensor}); "
        f"{rough_percent(kept.changed_share)} of the values {verb_of_values}"
    )
