"""The options and rules of the commands that take weights apart and put them together: extract, combine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mapconv.options.kinds import Choice, Names, Share, Source, Text, Whole
from mapconv.options.records import Command, Option
from mapconv.options.rules import Check, Excludes, Requires, Spell
from mapconv.options.shared import (
    ALLOW_PICKLE,
    AS_MANY_WEIGHTS,
    BASE,
    DATA,
    DEVICE,
    DIRECTION,
    DRY_RUN,
    DTYPE,
    LORA_COMPATIBLE,
    MAX_RANK,
    OUT,
    RANK,
    SAMPLES,
    SEQUENCE_LENGTH,
    STATISTICS,
    TALK,
    TOLERANCE,
    WEIGHTS,
)

#: What is right for most finetunes: PEFT's own default is 8, and published LoRAs mostly have 16 to 64.
EXTRACT_RANK = RANK.but(help="Rank of the result.", fallback=16)

_WITH_DATA = tuple(Requires(name, "data") for name in ("samples", "sequence_length", "statistics"))

EXTRACT = Command(
    "extract",
    Option("finetuned", Source(), positional=True, required=True, in_catalog=False),
    BASE.but(help="The model that it was finetuned from: a folder or a Hub id.", required=True),
    OUT.but(help="Folder to write. Default: FINETUNED-map beside FINETUNED."),
    Option(
        "targets",
        Names(),
        "Modules to refit, as in PEFT: ends of names with commas, or a regular expression. Default: all but heads.",
        metavar="NAMES",
    ),
    Option(
        "exclude",
        Names(),
        "Modules to leave as the base has them, named likewise; also norms, heads and embeddings.",
        metavar="NAMES",
    ),
    EXTRACT_RANK,
    TOLERANCE.but(
        help="Instead of --rank: for each module the smallest rank whose relative error ε is at most EPS, apart from "
        "the rounding of the finetune's own dtype.",
    ),
    MAX_RANK,
    DIRECTION.but(help="low-rank: Δ = BA. dora: the finetune's own row norms are kept, and BA gives the direction."),
    LORA_COMPATIBLE,
    DTYPE.but(help="Dtype of the stored factors; auto takes the finetune's."),
    DATA.but(help="Sample text for the finetuned model; fits layer outputs on its own activations."),
    SAMPLES,
    SEQUENCE_LENGTH,
    STATISTICS,
    DEVICE,
    DRY_RUN,
    TALK,
    rules=(
        Excludes("rank", "tolerance"),
        Requires("max_rank", "tolerance"),
        Excludes("lora_compatible", ("direction", "dora"), "a DoRA direction is not a plain LoRA"),
        *_WITH_DATA,
    ),
)


def _density(given: Mapping[str, Any], spell: Spell) -> str | None:
    method = given.get("method", "sum")
    if "density" in given and method == "sum":
        return f"{spell('density', ...)} requires {spell('method', 'ties')}, dare or dare-ties"
    if "density" not in given and method != "sum":
        return f"{spell('method', method)} requires {spell('density', ...)}, such as {spell('density', 0.5)}"
    if "seed" in given and not method.startswith("dare"):
        return f"{spell('seed', ...)} requires {spell('method', 'dare')} or dare-ties"
    return None


COMBINE = Command(
    "combine",
    Option("adapters", Source(), metavar="ADAPTER", positional=True, many=True, required=True, in_catalog=False),
    BASE,
    OUT.but(help="Folder to write. Default: the first ADAPTER's name with -combined."),
    WEIGHTS.but(in_catalog=True),
    Option(
        "method",
        Choice(("sum", "ties", "dare", "dare-ties")),
        "sum: add the updates up. ties, dare: mix them element by element, as these papers do.",
        default="sum",
    ),
    Option("density", Share(), "Share of elements that ties and dare keep of each update.", metavar="D"),
    Option("seed", Whole(0), "Random seed of dare.", fallback=0, metavar="N"),
    Option(
        "whole",
        Text(),
        "Heads and other whole tensors that disagree: first, mean, or the adapter whose tensors count.",
        metavar="NAME",
    ),
    RANK.but(help="Rank of the result. Default: all of a sum of LoRAs, which is exact; else the ranks together."),
    TOLERANCE,
    MAX_RANK,
    DIRECTION.but(help="low-rank: Δ = BA. dora: the wanted row norms are kept, and BA gives the direction."),
    LORA_COMPATIBLE,
    DTYPE.but(help="Dtype of the stored factors; auto takes the first adapter's."),
    DATA.but(help="Sample text; weighs what a rank leaves out by the inputs that the combined model's layers get."),
    SAMPLES,
    SEQUENCE_LENGTH,
    STATISTICS,
    DEVICE,
    ALLOW_PICKLE,
    DRY_RUN,
    TALK,
    rules=(
        AS_MANY_WEIGHTS,
        Check(("method", "density", "seed"), _density),
        Excludes("rank", "tolerance"),
        Requires("max_rank", "tolerance"),
        Excludes("lora_compatible", ("direction", "dora"), "a DoRA direction is not a plain LoRA"),
        *_WITH_DATA,
    ),
)
