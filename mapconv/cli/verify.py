"""``mapconv verify``."""

from __future__ import annotations

import statistics
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mapconv.cli import options
from mapconv.cli.output import notes, print_json, print_table, small
from mapconv.hub.reference import shown

if TYPE_CHECKING:
    from mapconv.commands.verify import VerifyReport


@click.command("verify", short_help="Measure how far a result is from its source.")
@click.argument("result", type=options.SOURCE)
@click.option(
    "--against", type=options.SOURCE, required=True, metavar="SOURCE", help="The LoRA or DoRA adapter it was made from."
)
@options.base
@click.option(
    "--against-base",
    metavar="BASE",
    help="Base that SOURCE runs on, where it was trained on another, as a quantized copy. Default: the same.",
)
@click.option(
    "--data",
    type=options.FOLDER,
    metavar="FILE",
    help="Text, .jsonl or .parquet to run on. Default: a text that ships with mapconv.",
)
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    metavar="N",
    help="Sequences of 256 tokens to run.",
)
@click.option(
    "--max-kl", type=click.FloatRange(min=0), metavar="X", help="Exit 1 if the mean KL divergence is above X."
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="What the models compute in.",
)
@options.device
@click.option("--save", is_flag=True, help="Store the report in RESULT, for the model card of `mapconv push`.")
@options.allow_pickle
@options.as_json
@options.quiet
def command(
    result: str,
    against: str,
    base: str | None,
    against_base: str | None,
    data: Path | None,
    samples: int,
    max_kl: float | None,
    dtype: str,
    device: str,
    save: bool,
    allow_pickle: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Compare RESULT (a MAP folder or a merged model) with the adapter it was made from.

    Both run as functions on the same text, with stock PEFT playing the source, and every weight is compared as well.
    """
    from mapconv.commands.verify import verify
    from mapconv.errors import FidelityError

    report = verify(
        result,
        against,
        base=base,
        against_base=against_base,
        data=data,
        samples=samples,
        device=device,
        dtype=dtype,
        save=save,
        allow_pickle=allow_pickle,
        quiet=quiet,
    )
    if as_json:
        print_json(report.to_dict())
    else:
        _report(report)
    notes(report.notes)
    if max_kl is not None and report.kl is None:
        raise FidelityError(f"{result}: --max-kl was asked for, but the model could not be run.")
    if max_kl is not None and not report.kl <= max_kl:  # a NaN is over any limit
        raise FidelityError(f"{result}: KL {report.kl:.3g} to the source is over --max-kl {max_kl:g}.")


def _report(report: VerifyReport) -> None:
    where = f"{shown(report.result)} against {shown(report.source)}"
    click.echo(f"{where}, {report.tokens:,} positions, {report.seconds:.1f} s")
    click.echo()
    if report.kl is not None:
        _functions(report)
    groups = defaultdict(list)
    for module in report.modules:
        groups[module.path.rpartition(".")[2]].append(module.error)
    print_table(
        ["weights of", "modules", "ε worst", "ε median"],
        [
            [name, str(len(errors)), small(max(errors)), small(statistics.median(errors))]
            for name, errors in groups.items()
        ],
    )


def _functions(report: VerifyReport) -> None:
    rows = [
        ("base", report.perplexity_base, report.kl_base),
        ("source", report.perplexity_source, 0.0),
        ("result", report.perplexity_result, report.kl),
    ]
    print_table(
        ["model", "perplexity", "KL(source ‖ model)"],
        [[name, "-" if perplexity is None else f"{perplexity:.4f}", small(kl)] for name, perplexity, kl in rows],
    )
    click.echo()
    click.echo(f"  top-1 agreement               {report.top1_agreement:.2%}")
    click.echo(f"  largest KL at one position    {small(report.kl_largest)}")
    click.echo(f"  largest logit difference      {small(report.largest_logit_difference)}")
    click.echo()
