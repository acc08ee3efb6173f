"""``mapconv push``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mapconv.cli import options
from mapconv.cli.output import notes, print_json, print_table, say, size
from mapconv.wording import counted

if TYPE_CHECKING:
    from mapconv.commands.push import PushResult


@click.command("push", short_help="Publish a result on the Hugging Face Hub.")
@click.argument("path", type=options.FOLDER)
@click.argument("repo_id")
@click.option("--private", is_flag=True, help="Create the repository private; refused if it exists and is public.")
@click.option("--revision", metavar="BRANCH", help="Branch to commit to, created if need be.  [default: main]")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing.")
@click.option("--message", "-m", metavar="TEXT", help="Title of the commit.")
@click.option("--license", metavar="ID", help="Licence for the card. Default: what the source's or base's card says.")
@click.option(
    "--base-id", metavar="HUB_ID", help="The base model's name on the Hub, if the result was made on a folder."
)
@click.option("--token", metavar="TOKEN", help="Default: HF_TOKEN, or the token of `hf auth login`.")
@click.option("--dry-run", is_flag=True, help="Check everything, show what would be sent, open no connection.")
@options.as_json
@click.option("--yes", "-y", is_flag=True, help="Do not ask before sending. Without a terminal nothing is asked.")
@options.quiet
def command(
    path: Path,
    repo_id: str,
    private: bool,
    revision: str | None,
    create_pr: bool,
    message: str | None,
    license: str | None,
    base_id: str | None,
    token: str | None,
    dry_run: bool,
    as_json: bool,
    yes: bool,
    quiet: bool,
) -> None:
    """Publish PATH, a MAP adapter or a merged model, as the model repository REPO_ID (owner/name).

    Sends the files that mapconv knows and nothing else, with a model card. No local path is sent, and a second push of
    the same content makes no commit.
    """
    from mapconv.commands.push import Push
    from mapconv.hub.client import Secret
    from mapconv.publishing.upload import Destination

    secret = Secret(token)
    token = None  # a traceback that prints local variables must not find it here

    to = Destination(repo_id, private, revision, create_pr, message or "Upload with mapconv")
    job = Push(path, to, license=license, base_id=base_id)
    plan = job.plan()
    if not as_json:
        _show(plan, create_pr)
    if dry_run:
        if as_json:
            print_json(plan.to_dict())
        return
    if not yes and sys.stdin.isatty() and not click.confirm(f"Send this to {repo_id}?", err=True):
        say("nothing was sent.")
        sys.exit(1)
    try:
        result = job.send(secret, quiet=quiet)
    except KeyboardInterrupt:
        say("mapconv: error: interrupted: the push may be incomplete, run the same command again to finish it.")
        sys.exit(130)
    if as_json:
        print_json(result.to_dict())
    else:
        _report(result)


def _show(plan: PushResult, create_pr: bool) -> None:
    what = "MAP adapter" if plan.kind == "adapter" else "merged model"
    click.echo(f"{plan.path} ({what}) → {plan.repo_id}{' (as a pull request)' if create_pr else ''}")
    click.echo(f"  base      {plan.base}{f' @ {plan.base_revision[:12]}' if plan.base_revision else ''}")
    click.echo(f"  source    {plan.source or 'not on the Hub'}")
    click.echo(f"  license   {plan.license or 'none: give one with --license'}")
    click.echo()
    print_table(["file", "size", ""], [[file.name, size(file.nbytes), file.note] for file in plan.files])
    click.echo()
    click.echo(f"  {counted(len(plan.files), 'file')}, {size(plan.nbytes)}")
    if plan.left_behind:
        notes([f"not sent, because mapconv does not know them: {', '.join(plan.left_behind)}"])


def _report(result: PushResult) -> None:
    click.echo()
    if not result.changed and result.pull_request is None:
        click.echo(f"nothing to send: {result.repo_id} has these files already")
    click.echo(result.pull_request or result.url)
    click.echo(f"commit {result.commit}")
