"""The options and rules of the commands that make MAP adapters: upgrade, rebase, statistics, calibrate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mapconv.options.kinds import (
    Choice,
    CountOrShare,
    Flag,
    Folder,
    Real,
    Source,
    Whole,
)
from mapconv.options.records import Command, Option
from mapconv.options.rules import Check, Excludes, Requires, Spell
from mapconv.options.shared import (
    AGAINST,
    ALLOW_PICKLE,
    BASE,
    CALIBRATE_AFTERWARDS,
    DATA,
    DEVICE,
    DORA_AXIS,
    DORA_NORM,
    DRY_RUN,
    DTYPE,
    FITTING,
    MAX_RANK,
    OUT,
    RANK,
    RANK_AT_MOST,
    REFIT,
    SAMPLES,
    SEQUENCE_LENGTH,
    SOURCE,
    TALK,
    TOLERANCE,
)

UPGRADE = Command(
    "upgrade",
    SOURCE,
    BASE,
    OUT.but(help="Folder to write. Default: SOURCE-map beside SOURCE."),
    REFIT,
    RANK_AT_MOST,
    DTYPE,
    FITTING,
    DEVICE,
    DORA_AXIS,
    DORA_NORM,
    DRY_RUN,
    ALLOW_PICKLE,
    TALK,
    rules=(
        Excludes("calibrate", "lora_compatible", "it would train the α that has to stay fixed"),
        Excludes("rank_at_most", "rank"),
        Excludes("rank_at_most", "tolerance", "the one asks for a rank, the other for an error"),
        Excludes("rank_at_most", ("direction", "dora"), "DoRA's own factors keep their rank"),
    ),
)


def _text_to_train_on(given: Mapping[str, Any], spell: Spell) -> str | None:
    if "calibrate" not in given or "data" in given:
        return None
    if "statistics_from" in given or given.get("statistics") == "none":
        without = spell("statistics_from", ...) if "statistics_from" in given else spell("statistics", "none")
        return f"{spell('calibrate', ...)} needs text, which {without} has none of: it requires {spell('data', ...)}"
    return None


REBASE = Command(
    "rebase",
    SOURCE,
    BASE.but(help="Base that the adapter was trained on. Default: the one that its config names."),
    Option(
        "onto",
        Source(),
        "Base that the result is for: a folder or a Hub id, of the same architecture, quantized or not.",
        metavar="OTHER",
        required=True,
    ),
    OUT.but(help="Folder to write. Default: SOURCE-rebased beside SOURCE."),
    RANK.but(help="Rank of the result. Default: the source's own. A higher one also repairs what OTHER lost."),
    TOLERANCE,
    MAX_RANK,
    Option(
        "all_linear",
        Flag(),
        "Also fit every other linear layer that OTHER changed. --rank is then the mean, shared out by --spread-rank.",
        default=False,
    ),
    Option(
        "spread_rank",
        Flag(),
        "Take --rank as the mean: give rank to the layers whose outputs it brings closest, parameter for parameter.",
        default=False,
    ),
    Option(
        "pad_ranks",
        Flag(),
        "Pad all factors with zeros to the largest rank, for servers that take one rank.",
        default=False,
    ),
    Option(
        "free_gain",
        Flag(),
        "Fit a factor of OTHER's weights as well; the result then runs as a DoRA, not as a plain LoRA.",
        default=False,
    ),
    DTYPE,
    DATA.but(help="Sample text from the adapter's domain. Default: the source model writes its own."),
    SAMPLES.but(help="Sequences to fit on. Default: 32 of --data, or 64 that the source writes.", fallback=None),
    SEQUENCE_LENGTH,
    Option(
        "statistics",
        Choice(("source", "running", "none")),
        "source: fit to the source's inputs. running: to inputs as the rebased layers give them. none: to weights.",
        default="source",
    ),
    Option(
        "statistics_from",
        Folder(),
        "Output of `mapconv statistics` for the base: no model runs; --data is then used only to measure the result.",
        metavar="STATS",
    ),
    CALIBRATE_AFTERWARDS.but(
        help="Afterwards train the factors towards the source on its own base for STEPS steps, with both bases in "
        "float32 in memory.",
    ),
    Option(
        "seed",
        Whole(0),
        "Random seed of the text that the source model writes, and of the order of training.",
        default=0,
        metavar="N",
    ),
    DEVICE,
    Option(
        "keep_worse",
        Flag(),
        "Write the result even if it is further from the source than the source itself on OTHER.",
        default=False,
    ),
    DRY_RUN,
    ALLOW_PICKLE,
    TALK,
    rules=(
        Excludes("rank", "tolerance"),
        Requires("max_rank", "tolerance"),
        Excludes("spread_rank", "tolerance", "each layer gets the rank that it needs"),
        Excludes("pad_ranks", "tolerance", "the largest rank is not known before the last layer is fitted"),
        Excludes("statistics", "statistics_from", "the folder says how they were collected"),
        Excludes("samples", "statistics_from", "the folder says how many there were"),
        Check(("calibrate", "data", "statistics", "statistics_from"), _text_to_train_on),
    ),
)

STATISTICS_COMMAND = Command(
    "statistics",
    BASE.but(positional=True, required=True, help=""),
    DATA.but(required=True, help="Sample text from the domain of the adapters."),
    OUT.but(required=True, help="Folder to write."),
    SAMPLES,
    SEQUENCE_LENGTH,
    DEVICE,
    TALK,
)

CALIBRATE = Command(
    "calibrate",
    Option("adapter", Source(), metavar="MAPDIR", positional=True, required=True, in_catalog=False),
    AGAINST,
    DATA.but(required=True, help="Text, or .jsonl or .parquet with text, messages, or input and label."),
    BASE,
    OUT.but(help="Folder to write. Default: MAPDIR-calibrated beside MAPDIR."),
    Option("steps", Whole(), "Optimizer steps.", default=50, metavar="N"),
    Option(
        "train",
        Choice(("scalars", "all")),
        "scalars: α and β of every weight. all: its factors as well.",
        default="scalars",
    ),
    Option(
        "objective",
        Choice(("distill", "task")),
        "distill: the source's distribution. task: the data's own tokens or labels.",
        default="distill",
    ),
    Option(
        "learning_rate", Real(above=0), "Peak learning rate. Default: depends on --train.", spelling="--lr", metavar="X"
    ),
    Option("batch_size", Whole(), "Sequences per step, over all processes.", default=4, metavar="N"),
    SEQUENCE_LENGTH.but(default=256, fallback=None),
    Option(
        "held_out",
        CountOrShare(),
        "Sequences to hold out; below 1, a share of the data. Default: a tenth of the data, at most 32, and in "
        "distillation one for 48 sequences of training, at least 3.",
        metavar="N",
    ),
    DEVICE,
    Option("seed", Whole(0), "Random seed for the data order and the held-out split.", default=0, metavar="N"),
    Option("resume", Flag(), "Continue an interrupted run with the same settings.", default=False, in_catalog=False),
    ALLOW_PICKLE,
    TALK,
)
