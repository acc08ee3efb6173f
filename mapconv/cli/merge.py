"""``mapconv merge``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from mapconv.cli.options import Chosen, command
from mapconv.cli.output import notes, print_json, say, show
from mapconv.cli.startup import starting
from mapconv.hub.reference import shown
from mapconv.options.commands import MERGE
from mapconv.wording import counted, rough_percent, size

if TYPE_CHECKING:
    from mapconv.commands.merge_outcome import MergeResult, PushedModel


@command(MERGE, "Merge an adapter into its base weights.")
def merge(chosen: Chosen) -> None:
    """Merge ADAPTER (a MAP folder, or a LoRA or DoRA adapter as it is) into its base model.

    Several adapters merge together: their updates add up, and a weight adapted by a DoRA cannot be adapted by another.

    The merged model loads with from_pretrained. Weights are computed in float32 and rounded once.

    With --push-to the merged model goes to the Hub without ever being whole on this disk. A base on the Hub is read
    from there. All becomes visible with one commit in the end; after an interruption, the same command goes on.
    """
    with starting(chosen["adapters"], chosen["base"], whole_base=True, quiet=chosen["quiet"]):
        from mapconv.commands.merge import merge

    try:
        result = merge(**chosen.arguments)
    except KeyboardInterrupt:
        if chosen["push_to"] is None:
            raise
        say("mapconv: error: interrupted: nothing is published yet, run the same command again to go on.")
        sys.exit(130)
    if chosen["as_json"]:
        print_json(result.to_dict())
    else:
        show(f"{' + '.join(map(str, chosen['adapters']))} ({result.method}) + {shown(result.base)}")
        if result.pushed is None:
            _show_folder(result)
        else:
            _show_pushed(result, result.pushed)
        if result.merged:
            _show_survival(result)
    notes(result.notes)


def _show_folder(result: MergeResult) -> None:
    verb = "would write" if result.dry_run else "wrote"
    show(f"  {verb} {result.out}: {_content(result)}")


def _show_pushed(result: MergeResult, pushed: PushedModel) -> None:
    if result.dry_run:
        show(f"  would publish {pushed.repo_id}: {_content(result)}, with {', '.join(pushed.others)}")
        show(f"  license {pushed.license or 'none: give one with --license'}")
        return
    show(f"  {'published' if pushed.changed else 'nothing new for'} {pushed.repo_id}: {_content(result)}")
    if pushed.taken_over:
        show(f"  {counted(len(pushed.taken_over), 'file')} of them stayed on the Hub, where the base has the same")
    show(f"  {pushed.url}")
    show(f"  commit {pushed.commit}")


def _content(result: MergeResult) -> str:
    return f"{counted(result.tensors, 'tensor')} in {counted(len(result.files), 'file')}, {size(result.nbytes)}"


def _show_survival(result: MergeResult) -> None:
    worst = max(result.merged, key=lambda item: item.rounding_error)
    verb, changes = ("would be merged", "would change") if result.dry_run else ("merged", "changes")
    verb_of_values = "would change" if result.dry_run else "changed"
    show(f"  {counted(len(result.merged), 'tensor')} {verb} in {result.seconds:.1f} s")
    most = rough_percent(worst.rounding_error)
    show(f"  {worst.dtype} rounding {changes} up to {most} of an update (worst: {worst.tensor})")
    kept, least = result.survival, min(result.merged, key=lambda item: item.survival.projection)
    show(
        f"  {kept.projection:.3f} of the update survives (least: {least.survival.projection:.3f}, {least.tensor}); "
        f"{rough_percent(kept.changed_share)} of the values {verb_of_values}"
    )
