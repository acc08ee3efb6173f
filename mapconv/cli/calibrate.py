"""``mapconv calibrate``."""

from __future__ import annotations

import os
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mapconv.cli import options
from mapconv.cli.output import notes, print_json, print_table, small, spread
from mapconv.cli.startup import starting
from mapconv.hub.reference import shown

if TYPE_CHECKING:
    from mapconv.training.calibration import CalibrationReport

#: The exit status of a run that Ctrl-C ended, as shells have it.
INTERRUPTED = 130


@click.command("calibrate", short_help="Train a MAP adapter towards its source, or on a task.")
@click.argument("adapter", type=options.SOURCE, metavar="MAPDIR")
@click.option(
    "--against", type=options.SOURCE, required=True, metavar="SOURCE", help="The LoRA or DoRA adapter it was made from."
)
@click.option(
    "--data",
    type=options.FOLDER,
    required=True,
    metavar="FILE",
    help="Text, or .jsonl or .parquet with text, messages, or input and label.",
)
@options.base
@click.option("--out", "-o", type=options.FOLDER, help="Folder to write. Default: MAPDIR-calibrated beside MAPDIR.")
@click.option(
    "--steps", type=click.IntRange(min=1), default=50, show_default=True, metavar="N", help="Optimizer steps."
)
@click.option(
    "--train",
    type=click.Choice(["scalars", "all"]),
    default="scalars",
    show_default=True,
    help="scalars: α and β of every weight. all: its factors as well.",
)
@click.option(
    "--objective",
    type=click.Choice(["distill", "task"]),
    default="distill",
    show_default=True,
    help="distill: the source's distribution. task: the data's own tokens or labels.",
)
@click.option(
    "--lr", type=click.FloatRange(min=0, min_open=True), metavar="X", help="Highest learning rate. Default: by --train."
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    metavar="N",
    help="Sequences in a step, over all processes.",
)
@click.option(
    "--sequence-length",
    type=click.IntRange(min=2),
    default=256,
    show_default=True,
    metavar="N",
    help="Tokens in a sequence.",
)
@click.option(
    "--held-out",
    type=click.IntRange(min=1),
    metavar="N",
    help="Sequences to hold out. Default: a tenth of the data, at most 32.",
)
@options.device
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, metavar="N", help="Of the order of the data."
)
@click.option("--resume", is_flag=True, help="Go on where a run of the same settings was cut off.")
@options.allow_pickle
@options.as_json
@click.option(
    "--force",
    is_flag=True,
    help="Replace OUT (which may be MAPDIR), or accept another source or base than MAPDIR records.",
)
@options.quiet
def command(
    adapter: str,
    against: str,
    data: Path,
    base: str | None,
    out: Path | None,
    steps: int,
    train: str,
    objective: str,
    lr: float | None,
    batch_size: int,
    sequence_length: int,
    held_out: int | None,
    device: str,
    seed: int,
    resume: bool,
    allow_pickle: bool,
    as_json: bool,
    force: bool,
    quiet: bool,
) -> None:
    """Train the MAP adapter in MAPDIR on FILE, and write the state that is best on the part of it that is held out.

    The adapter as it came takes part, so that the result is never worse. Ctrl-C writes the best state so far.

    Several GPUs: accelerate launch -m mapconv calibrate …
    """
    if os.environ.get("RANK", "0") != "0":
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - the first process speaks for all, to the end of this one
    with starting([adapter, against], base, whole_base=True, quiet=quiet):
        from mapconv.commands.calibrate import calibrate

    result = calibrate(
        adapter,
        against=against,
        data=data,
        base=base,
        out=out,
        steps=steps,
        train=train,
        objective=objective,
        learning_rate=lr,
        batch_size=batch_size,
        sequence_length=sequence_length,
        held_out=held_out,
        device=device,
        seed=seed,
        resume=resume,
        allow_pickle=allow_pickle,
        force=force,
        quiet=quiet,
    )
    if result is None:
        return
    if as_json:
        print_json(result.to_dict())
    else:
        click.echo(f"{shown(result.adapter)} → {result.out}, against {shown(result.source)}")
        click.echo()
        print_calibration(result.report)
    notes(result.report.notes)
    if result.report.interrupted:
        sys.exit(INTERRUPTED)


def print_calibration(report: CalibrationReport) -> None:
    """The whole model's numbers, the modules' by type, and what was trained."""
    print_table(
        ["model", "perplexity", "KL(source ‖ model)", "top-1 as the source"],
        [
            [
                name,
                "-" if numbers.perplexity is None else f"{numbers.perplexity:.4f}",
                small(numbers.kl),
                f"{numbers.top1_agreement:.2%}",
            ]
            for name, numbers in report.models.items()
        ],
    )
    click.echo()
    groups = defaultdict(list)
    for module in report.modules:
        groups[module.path.rpartition(".")[2]].append(module)
    print_table(
        ["target", "modules", "α after/before", "β after/before", "ε median before", "after"],
        [_row(name, modules) for name, modules in groups.items()],
    )
    click.echo()
    click.echo(
        f"  {report.trained_parameters:,} numbers trained for {report.steps} steps on {report.tokens:,} tokens in "
        f"{report.seconds:.1f} s; step {report.best_step} is the best of {len(report.history)} that were measured"
    )
    click.echo(
        f"  measured on the written files at {report.held_out_positions:,} positions of "
        f"{report.held_out_sequences} held-out sequences"
    )


def _row(name: str, modules: list) -> list[str]:
    return [
        name,
        str(len(modules)),
        spread([_ratio(module.alpha, module.alpha_before) for module in modules]),
        spread([_ratio(module.beta, module.beta_before) for module in modules]),
        small(statistics.median(module.error_before for module in modules)),
        small(statistics.median(module.error for module in modules)),
    ]


def _ratio(after: float, before: float) -> float:
    return after / before if before else 1.0
