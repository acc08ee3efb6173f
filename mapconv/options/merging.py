"""The options and rules of ``merge``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mapconv.options.kinds import Choice, Folder, Names, Real, Repository, Size, Source
from mapconv.options.records import Command, Option
from mapconv.options.rules import Check, Excludes, Requires, Spell
from mapconv.options.shared import (
    ALLOW_PICKLE,
    AS_MANY_WEIGHTS,
    BASE,
    BASE_ID,
    DATA,
    DORA_AXIS,
    DORA_NORM,
    DRY_RUN,
    DTYPE,
    FORCE,
    JSON,
    LEAST_SHARD,
    LICENSE,
    MESSAGE,
    OUT,
    PRIVATE,
    QUIET,
    REVISION,
    SAMPLES,
    VERBOSE,
    WEIGHTS,
)


def _measured_base(given: Mapping[str, Any], spell: Spell) -> str | None:
    chosen = given.get("base_values")
    if "original" in given and chosen not in ("original", "measured"):
        return f"{spell('original', ...)} requires {spell('base_values', 'original')} or measured"
    for name in ("data", "samples"):
        if name in given and chosen != "measured" and given.get("rounding") != "feedback":
            return f"{spell(name, ...)} requires {spell('base_values', 'measured')} or {spell('rounding', 'feedback')}"
    return None


def _fed_back(given: Mapping[str, Any], spell: Spell) -> str | None:
    if given.get("rounding") != "feedback":
        return None
    chosen, adapters = spell("rounding", "feedback"), given["adapters"]
    if "data" not in given:
        return f"{chosen} requires {spell('data', ...)}, text that the layers' inputs are taken from"
    if given.get("dtype") == "float32":
        return f"{chosen} has nothing to do with {spell('dtype', 'float32')}"
    if (isinstance(adapters, list | tuple) and len(adapters) > 1) or "weights" in given:
        return f"{chosen} merges one adapter, with its own weight"
    return None


def _copied_codes(given: Mapping[str, Any], spell: Spell) -> str | None:
    kept = given.get("quantized")
    if kept is not None and given.get("dtype", "auto") != "auto":
        return (
            f"weights that stay in codes keep their dtype: {spell('quantized', kept)} requires {spell('dtype', 'auto')}"
        )
    for name in ("scales", "lift", "min_survival"):
        if name in given and kept != "keep":
            return f"{spell(name, ...)} requires {spell('quantized', 'keep')}"
    return None


def _one_place(given: Mapping[str, Any], spell: Spell) -> str | None:
    if "out" in given and "push_to" in given:
        return f"{spell('out', ...)} and {spell('push_to', ...)} cannot be used together: merge into OUT and push that"
    if "out" not in given and "push_to" not in given:
        return f"{spell('out', ...)} or {spell('push_to', ...)} is missing: say where the merged model goes"
    return None


_STAGE = "an entry is published by its stage push"
#: What runs the base, or goes through it twice.
_HELD = "it needs the whole model on this disk"
_ON_HUB = ("work_dir", "private", "revision", "message", "license", "base_id")
SCALES = Option(
    "scales",
    Choice(("keep", "recompute")),
    "With --quantized keep: the scales of merged weights.",
    fallback="recompute",
)
MERGE = Command(
    "merge",
    Option("adapters", Source(), metavar="ADAPTER", positional=True, many=True, required=True, in_catalog=False),
    BASE,
    OUT.but(help="Folder to write the merged model to."),
    Option(
        "push_to",
        Repository(),
        "Instead of --out: publish on the Hub, file by file, with at most two weights files on this disk.",
        metavar="OWNER/NAME",
        in_catalog=False,
        refusal=_STAGE,
    ),
    Option(
        "work_dir",
        Folder(),
        "With --push-to: folder for these two, where the same command goes on after a kill. Default: the Hub's cache.",
        metavar="DIR",
        in_catalog=False,
        refusal=_STAGE,
    ),
    *(
        option.but(help=f"With --push-to: {option.help[0].lower()}{option.help[1:]}", in_catalog=False, refusal=_STAGE)
        for option in (PRIVATE, REVISION, MESSAGE, LICENSE, BASE_ID)
    ),
    DTYPE.but(
        kind=Choice(("auto", "float32", "bfloat16", "float16")),
        default="auto",
        help="Dtype of the merged weights; auto keeps the base's.",
    ),
    Option(
        "max_shard_size",
        Size(LEAST_SHARD, word="keep"),
        "Largest weights file, such as 5GB; keep leaves the base's files.",
        fallback="keep",
        metavar="SIZE",
    ),
    WEIGHTS,
    Option(
        "rounding",
        Choice(("nearest", "feedback")),
        "feedback: round, to 16 bits or to codes, so that the layers' outputs on --data change least.",
        default="nearest",
    ),
    Option(
        "quantized",
        Choice(("dequantize", "copy", "keep")),
        "For a quantized base: write plain weights; copy the codes of unchanged weights; or keep its storage, also for "
        "merged ones.",
        default="dequantize",
    ),
    SCALES,
    Option(
        "lift",
        Names(),
        "With --quantized keep: modules to write in 16 bits instead, by ends of their names, or a regular expression.",
        metavar="NAMES",
    ),
    Option(
        "min_survival",
        Real(above=0),
        "With --quantized keep: lift modules of which less than X of the update would survive.",
        metavar="X",
    ),
    Option(
        "base_values",
        Choice(("original", "stored", "measured")),
        "For a quantized base: merge into its stored values, the original model, or whichever makes --data likelier.",
    ),
    Option(
        "original",
        Source(),
        "The model that a quantized base was made from, for --base-values. Default: what its card names.",
        metavar="BASE",
    ),
    DATA.but(
        help="Text, .jsonl or .parquet for --rounding, or that --base-values measures on (default: a shipped text)."
    ),
    SAMPLES.but(help="Sequences of 256 tokens of it. Default: 32 for --rounding, 8 for --base-values.", fallback=None),
    DORA_AXIS,
    DORA_NORM,
    ALLOW_PICKLE,
    DRY_RUN,
    JSON,
    FORCE.but(help="Replace OUT if it exists, and accept a base other than the one that a MAP adapter was made for."),
    VERBOSE,
    QUIET,
    rules=(
        Check(("out", "push_to"), _one_place),
        *(Requires(name, "push_to") for name in _ON_HUB),
        *(Excludes(term, "push_to", _HELD) for term in (("rounding", "feedback"), "min_survival", "base_values")),
        AS_MANY_WEIGHTS,
        Check(("quantized", "dtype", "scales", "lift", "min_survival"), _copied_codes),
        Check(("base_values", "original", "data", "samples"), _measured_base),
        Check(("rounding", "data", "dtype", "adapters", "weights"), _fed_back),
        Excludes("verbose", "quiet"),
    ),
)
