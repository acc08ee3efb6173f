"""``mapconv push``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from mapconv.cli.options import Chosen, command
from mapconv.cli.output import notes, print_json, print_table, say, show
from mapconv.options.commands import PUSH
from mapconv.options.shared import MESSAGE
from mapconv.wording import counted, size

if TYPE_CHECKING:
    from mapconv.commands.push import PushResult


@command(PUSH, "Publish a result on the Hugging Face Hub.")
def push(chosen: Chosen) -> None:
    """Publish PATH, a MAP adapter or a merged model, as the model repository REPO_ID (owner/name).

    Sends the files that mapconv knows and nothing else, with a model card. No local path is sent, and a second push of
    the same content makes no commit.
    """
    from mapconv.commands.push import Push
    from mapconv.hub.client import Secret
    from mapconv.publishing.upload import Destination

    secret = Secret(chosen.pop("token"))  # a traceback that prints local variables must not find it here
    as_json, repo_id, create_pr = chosen["as_json"], chosen["repo_id"], chosen["create_pr"]
    message = chosen["message"] or MESSAGE.fallback
    to = Destination(repo_id, chosen["private"], chosen["revision"], create_pr, message)
    job = Push(chosen["path"], to, license=chosen["license"], base_id=chosen["base_id"])
    plan = job.plan()
    if not as_json:
        _show(plan, create_pr)
    if chosen["dry_run"]:
        if as_json:
            print_json(plan.to_dict())
        return
    if not chosen["yes"] and sys.stdin.isatty() and not click.confirm(f"Send this to {repo_id}?", err=True):
        say("nothing was sent.")
        sys.exit(1)
    try:
        result = job.send(secret, quiet=chosen["quiet"])
    except KeyboardInterrupt:
        say("mapconv: error: interrupted: the push may be incomplete, run the same command again to finish it.")
        sys.exit(130)
    if as_json:
        print_json(result.to_dict())
    else:
        _report(result)


def _show(plan: PushResult, create_pr: bool) -> None:
    what = "MAP adapter" if plan.kind == "adapter" else "merged model"
    show(f"{plan.path} ({what}) → {plan.repo_id}{' (as a pull request)' if create_pr else ''}")
    show(f"  base      {plan.base}{f' @ {plan.base_revision[:12]}' if plan.base_revision else ''}")
    show(f"  source    {plan.source or 'not on the Hub'}")
    show(f"  license   {plan.license or 'none: give one with --license'}")
    show()
    print_table(["file", "size", ""], [[file.name, size(file.nbytes), file.note] for file in plan.files])
    show()
    show(f"  {counted(len(plan.files), 'file')}, {size(plan.nbytes)}")
    if plan.left_behind:
        notes([f"not sent, because mapconv does not know them: {', '.join(plan.left_behind)}"])


def _report(result: PushResult) -> None:
    show()
    if not result.changed and result.pull_request is None:
        show(f"nothing to send: {result.repo_id} has these files already")
    show(result.pull_request or result.url or "")
    show(f"commit {result.commit}")
