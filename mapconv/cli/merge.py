"""``mapconv merge``."""

from __future__ import annotations

from pathlib import Path

import click

from mapconv.cli import options
from mapconv.cli.output import notes, print_json, size, small
from mapconv.hub.reference import shown


@click.command("merge", short_help="Merge an adapter into its base weights.")
@click.argument("adapters", metavar="ADAPTER...", type=options.SOURCE, nargs=-1, required=True)
@options.base
@click.option("--out", "-o", type=options.FOLDER, required=True, help="Folder to write the merged model to.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Of the merged weights; auto keeps the base's.",
)
@click.option(
    "--max-shard-size",
    type=options.ShardSize(),
    default="keep",
    show_default=True,
    help="Largest weights file, such as 5GB; keep leaves the base's files.",
)
@click.option(
    "--weights",
    type=options.Numbers(),
    metavar="W,W,...",
    help="A factor for each adapter's update. Default: 1 for each.",
)
@click.option(
    "--quantized",
    type=click.Choice(["dequantize", "copy"]),
    default="dequantize",
    show_default=True,
    help="Of a quantized base: write plain weights, or copy codes where the adapter changes none.",
)
@click.option(
    "--base-values",
    type=click.Choice(["original", "stored", "measured"]),
    help="Of a quantized base: merge into its stored values, the original model, or what --data is likelier under.",
)
@click.option(
    "--original",
    metavar="BASE",
    help="The model that a quantized base was made from, for --base-values. Default: what its card names.",
)
@click.option(
    "--data",
    type=options.FOLDER,
    metavar="FILE",
    help="Text, .jsonl or .parquet that --base-values measures on. Default: a text that ships with mapconv.",
)
@options.allow_pickle
@options.dry_run
@options.as_json
@click.option(
    "--force", is_flag=True, help="Replace OUT if it exists, and accept another base than a MAP adapter was made for."
)
@options.quiet
def command(
    adapters: tuple[str, ...],
    base: str | None,
    out: Path,
    dtype: str,
    max_shard_size: int | None,
    weights: tuple[float, ...] | None,
    quantized: str,
    base_values: str | None,
    original: str | None,
    data: Path | None,
    allow_pickle: bool,
    dry_run: bool,
    as_json: bool,
    force: bool,
    quiet: bool,
) -> None:
    """Merge ADAPTER (a MAP folder, or a LoRA or DoRA adapter as it is) into its base model.

    Several adapters merge together: their updates add up, and a weight that a DoRA adapts takes no other.

    The merged model loads with from_pretrained. Weights are computed in float32 and rounded once.
    """
    if weights is not None and len(weights) != len(adapters):
        raise click.UsageError(f"--weights has {len(weights)} numbers for {len(adapters)} adapters.")
    if quantized == "copy" and dtype != "auto":
        raise click.UsageError("--quantized copy keeps the codes as they are: it takes no --dtype.")
    if base_values in (None, "stored") and original is not None:
        raise click.UsageError("--original is for --base-values original or measured.")
    if base_values != "measured" and data is not None:
        raise click.UsageError("--data is for --base-values measured.")
    from mapconv.commands.merge import merge

    result = merge(
        adapters,
        out,
        base=base,
        dtype=dtype,
        max_shard_size=max_shard_size,
        weights=weights,
        quantized=quantized,
        base_values=base_values,
        original=original,
        data=data,
        allow_pickle=allow_pickle,
        force=force,
        dry_run=dry_run,
        quiet=quiet,
    )
    if as_json:
        print_json(result.to_dict())
    else:
        verb = "would write" if dry_run else "wrote"
        click.echo(f"{' + '.join(map(str, adapters))} ({result.method}) + {shown(result.base)}")
        click.echo(
            f"  {verb} {result.out}: {result.tensors} tensors in {len(result.files)} files, {size(result.nbytes)}"
        )
    if not as_json and not dry_run:
        worst = max(result.merged, key=lambda item: item.rounding_error)
        click.echo(f"  {len(result.merged)} tensors merged in {result.seconds:.1f} s")
        click.echo(
            f"  rounding to {worst.dtype} moves a tensor by at most {small(worst.rounding_error)} of its update "
            f"({worst.tensor})"
        )
    notes(result.notes)
