"""``mapconv upgrade``."""

from __future__ import annotations

import statistics
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mapconv.cli import options
from mapconv.cli.calibrate import INTERRUPTED, print_calibration
from mapconv.cli.output import notes, print_json, print_table, size, small, spread
from mapconv.hub.reference import shown
from mapconv.wording import counted

if TYPE_CHECKING:
    from mapconv.adapter import MapModule
    from mapconv.commands.upgrade import UpgradeResult

#: Above this ε, half of what the adapter does to a weight's direction is lost there: worth a word of advice.
LARGE_ERROR = 0.1


@click.command("upgrade", short_help="Convert a LoRA or DoRA adapter to MAP form.")
@click.argument("source", type=options.SOURCE)
@options.base
@click.option("--out", "-o", type=options.FOLDER, help="Folder to write. Default: SOURCE-map beside SOURCE.")
@click.option("--rank", type=click.IntRange(min=1), metavar="N", help="Rank of the result. Default: the source's own.")
@click.option(
    "--tolerance",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    metavar="EPS",
    help="Instead of --rank: for each module the smallest rank whose ε is at most EPS.",
)
@click.option(
    "--max-rank", type=click.IntRange(min=1), metavar="N", help="Highest rank for --tolerance.  [default: 256]"
)
@click.option(
    "--direction",
    type=click.Choice(["low-rank", "dora"]),
    default="low-rank",
    show_default=True,
    help="low-rank: Δ = BA, the lightest to run. dora: DoRA's own update, exact.",
)
@click.option(
    "--lora-compatible", is_flag=True, help="Hold α = ‖W0‖, so that the result is a plain LoRA adapter as well."
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16", "auto"]),
    default="float32",
    show_default=True,
    help="Of the stored factors; auto keeps the source's.",
)
@click.option(
    "--data",
    type=options.FOLDER,
    metavar="FILE",
    help="Text that the adapter is for: refit its outputs on it, instead of its weights.",
)
@click.option("--samples", type=click.IntRange(min=1), metavar="N", help="Sequences of --data to run.  [default: 32]")
@click.option(
    "--sequence-length", type=click.IntRange(min=2), metavar="L", help="Tokens in a sequence.  [default: 256]"
)
@click.option(
    "--statistics",
    type=click.Choice(["full", "diagonal"]),
    help="Of a layer's inputs; diagonal takes less memory.  [default: full]",
)
@click.option(
    "--calibrate",
    type=click.IntRange(min=1),
    metavar="STEPS",
    help="Then train α and β towards the source on --data, as `mapconv calibrate` does.",
)
@options.device
@options.dry_run
@options.allow_pickle
@options.as_json
@options.force
@options.quiet
def command(
    source: str,
    base: str | None,
    out: Path | None,
    rank: int | None,
    tolerance: float | None,
    max_rank: int | None,
    direction: str,
    lora_compatible: bool,
    dtype: str,
    data: Path | None,
    samples: int | None,
    sequence_length: int | None,
    statistics: str | None,
    calibrate: int | None,
    device: str,
    dry_run: bool,
    allow_pickle: bool,
    as_json: bool,
    force: bool,
    quiet: bool,
) -> None:
    """Convert the LoRA or DoRA adapter in SOURCE, a folder or a Hub id (owner/name), to MAP form.

    A LoRA converts exactly. A DoRA is refitted: the closest MAP weight of the same rank, solved to the optimum, with
    its relative error ε for each module. The result is a folder that stock PEFT loads.
    """
    if rank is not None and tolerance is not None:
        raise click.UsageError("--rank and --tolerance exclude each other.")
    if max_rank is not None and tolerance is None:
        raise click.UsageError("--max-rank goes with --tolerance.")
    if lora_compatible and direction == "dora":
        raise click.UsageError("--lora-compatible needs --direction low-rank: a DoRA direction is no plain LoRA.")
    if calibrate and lora_compatible:
        raise click.UsageError("--calibrate trains the α that --lora-compatible holds: leave one of them out.")
    about_data = {
        "samples": samples,
        "sequence_length": sequence_length,
        "statistics": statistics,
        "calibrate": calibrate,
    }
    about_data = {name: value for name, value in about_data.items() if value is not None}
    if data is None and about_data:
        raise click.UsageError(f"--{min(about_data).replace('_', '-')} goes with --data.")
    from mapconv.commands.upgrade import DEFAULT_MAX_RANK, upgrade

    result = upgrade(
        source,
        out,
        base=base,
        rank=rank,
        tolerance=tolerance,
        max_rank=max_rank or DEFAULT_MAX_RANK,
        direction=direction,
        lora_compatible=lora_compatible,
        dtype=dtype,
        data=data,
        **about_data,
        device=device,
        allow_pickle=allow_pickle,
        force=force,
        dry_run=dry_run,
        quiet=quiet,
    )
    if as_json:
        print_json(result.to_dict())
    elif dry_run:
        click.echo(f"would convert {counted(result.planned, f'{result.method} module')} on {shown(result.base)}")
        click.echo(f"would write {result.out} (about {size(result.nbytes)})")
    else:
        _report(result, tolerance)
    notes(result.notes)
    if result.calibration is not None and result.calibration.interrupted:
        raise click.exceptions.Exit(INTERRUPTED)


def _report(result: UpgradeResult, tolerance: float | None) -> None:
    groups = defaultdict(list)
    for module in result.modules:
        groups[module.path.rpartition(".")[2]].append(module)
    click.echo(f"{shown(result.source)} ({result.method}) → {result.out} (MAP)")
    click.echo()
    with_data = any(module.output_error is not None for module in result.modules)
    print_table(
        ["target", "modules", "rank", "α/‖W0‖", "β/α", "ε worst", "ε median"]
        + (["of outputs: worst", "median"] if with_data else []),
        [_row(name, modules, with_data=with_data) for name, modules in groups.items()],
    )
    errors = [module.error for module in result.modules]
    click.echo()
    click.echo(
        f"  {counted(len(errors), 'module')}, {result.parameters:,} parameters, {size(result.nbytes)}, "
        f"{result.seconds:.1f} s; "
        f"ε worst {small(max(errors))}, median {small(statistics.median(errors))}"
    )
    if result.calibration is not None:
        click.echo()
        print_calibration(result.calibration)
    also = "a plain LoRA" if result.plain_lora else "a DoRA"
    click.echo(f"  stock PEFT loads it as {also} adapter: PeftModel.from_pretrained(base, {str(result.out)!r})")
    advice = _advice(result, tolerance)
    if advice:
        click.echo(f"  advice: {advice}")


def _row(name: str, modules: list[MapModule], *, with_data: bool) -> list[str]:
    ranks = sorted({module.rank for module in modules})
    seen = [module.output_error for module in modules if module.output_error is not None]
    of_outputs = [small(max(seen)), small(statistics.median(seen))] if seen else ["-", "-"]
    return [
        name,
        str(len(modules)),
        str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} … {ranks[-1]}",
        spread([module.base_gain for module in modules]),
        spread([module.beta / module.alpha if module.alpha else 0.0 for module in modules]),
        small(max(module.error for module in modules)),
        small(statistics.median(module.error for module in modules)),
        *(of_outputs if with_data else []),
    ]


def _advice(result: UpgradeResult, tolerance: float | None) -> str | None:
    if tolerance is not None:
        over = sum(_felt_error(module) > tolerance for module in result.modules)
        return (
            f"{counted(over, 'module')} above ε = {tolerance:g} at --max-rank: raise it, or use --direction dora"
            if over
            else None
        )
    worst = max((_felt_error(module) for module in result.modules), default=0.0)
    if worst <= LARGE_ERROR:
        return None
    if result.method == "LoRA":
        return "ε is large because --rank is below the source's own rank: without --rank the result is exact"
    has_data = any(module.output_error is not None for module in result.modules) or result.calibration is not None
    fit = "" if has_data else "--data FILE fits the outputs, "
    return (
        f"ε is large where DoRA's magnitudes do not fit in this rank: {fit}--direction dora is exact, "
        "--tolerance 0.1 chooses ranks, and `mapconv verify` shows what it means for the outputs"
    )


def _felt_error(module: MapModule) -> float:
    """ε of the outputs where data was seen, which is what was minimised there; else of the weights."""
    return module.error if module.output_error is None else module.output_error
