"""The options that several commands have, each once; a command that differs in a word says so with ``but``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mapconv.options.kinds import Choice, File, Flag, Folder, Real, Reals, Source, Text, Whole
from mapconv.options.records import Group, Option
from mapconv.options.rules import Check, Excludes, Requires, Spell

#: Files smaller than this are nobody's wish: a number without a unit was meant in megabytes or gigabytes.
LEAST_SHARD = 10_000

SOURCE = Option("source", Source(), positional=True, required=True, in_catalog=False)
AGAINST = Option(
    "against", Source(), "The LoRA or DoRA adapter it was made from.", metavar="SOURCE", required=True, in_catalog=False
)
BASE = Option(
    "base",
    Source(),
    "Base model: a folder, a Hub id, or original. Default: the one that the adapter's config names.",
    metavar="BASE",
    in_catalog=False,
)
OUT = Option("out", Folder(), "Folder to write.", short="-o", metavar="OUT", in_catalog=False)

RANK = Option("rank", Whole(), "Rank of the result. Default: the source's own.", metavar="N")
RANK_AT_MOST = Option(
    "rank_at_most",
    Whole(),
    "Give every module rank N, for servers that take one: cut those above it, pad those below with zeros.",
    metavar="N",
)
TOLERANCE = Option(
    "tolerance",
    Real(above=0, below=1),
    "Instead of --rank: for each module the smallest rank whose relative error ε is at most EPS.",
    metavar="EPS",
)
MAX_RANK = Option("max_rank", Whole(), "Highest rank that --tolerance may choose.", fallback=256, metavar="N")
DIRECTION = Option(
    "direction",
    Choice(("low-rank", "dora")),
    "low-rank: Δ = BA, the fastest to run. dora: DoRA's own update, exact.",
    default="low-rank",
)
LORA_COMPATIBLE = Option(
    "lora_compatible", Flag(), "Keep α fixed at ‖W0‖, so that the result is also a plain LoRA adapter.", default=False
)
#: What the result's factors are solved for.
REFIT = Group(
    (
        RANK.but(help="Rank of the result, such as to resize a LoRA. Default: the source's own."),
        TOLERANCE,
        MAX_RANK,
        DIRECTION,
        LORA_COMPATIBLE,
    ),
    (
        Excludes("rank", "tolerance"),
        Requires("max_rank", "tolerance"),
        Excludes("lora_compatible", ("direction", "dora"), "a DoRA direction is not a plain LoRA"),
    ),
)

DTYPE = Option(
    "dtype",
    Choice(("float32", "bfloat16", "float16", "auto")),
    "Dtype of the stored factors; auto keeps the source's.",
    default="float32",
)

DATA = Option(
    "data",
    File(exists=True),
    "Sample text from the adapter's domain; fits layer outputs instead of weights.",
    metavar="FILE",
)
SAMPLES = Option("samples", Whole(), "Sequences of --data to run.", fallback=32, metavar="N")
SEQUENCE_LENGTH = Option("sequence_length", Whole(2), "Tokens in a sequence.", fallback=256, metavar="N")
STATISTICS = Option(
    "statistics",
    Choice(("full", "diagonal")),
    "Second moments of the layer inputs to collect; diagonal takes less memory.",
    fallback="full",
)
CALIBRATE_AFTERWARDS = Option(
    "calibrate",
    Whole(0),
    "Then train α and β towards the source on --data for STEPS steps, as `mapconv calibrate` does.",
    default=0,
    metavar="STEPS",
)
#: Text that the result is fitted on.
FITTING = Group(
    (DATA, SAMPLES, SEQUENCE_LENGTH, STATISTICS, CALIBRATE_AFTERWARDS),
    tuple(Requires(name, "data") for name in ("samples", "sequence_length", "statistics", "calibrate")),
)

DEVICE = Option(
    "device",
    Choice(("auto", "cpu", "cuda"), pattern="cuda:[0-9]+"),
    "Where the heavy arithmetic runs; cuda:1 names one GPU of several.",
    default="auto",
)
DORA_AXIS = Option(
    "dora_axis",
    Choice(("out", "in")),
    "For a DoRA whose file does not say: whether its magnitudes belong to outputs or to inputs.",
)
DORA_NORM = Option(
    "dora_norm",
    Choice(("merged", "base")),
    "What a DoRA divides its magnitudes by: the norm of the merged weight, as in training, or of the base.",
    default="merged",
)
ALLOW_PICKLE = Option(
    "allow_pickle",
    Flag(),
    "Also read .bin files (pickles, opened with torch's weights-only loader).",
    default=False,
)
DRY_RUN = Option("dry_run", Flag(), "Check everything, show the plan, write nothing.", default=False, in_catalog=False)
FORCE = Option("force", Flag(), "Replace OUT if it exists.", default=False, in_catalog=False)
JSON = Option(
    "as_json",
    Flag(),
    "Print the result as JSON on stdout.",
    False,
    spelling="--json",
    in_python=False,
    in_catalog=False,
)
#: Functions are quiet unless told otherwise; the command line talks.
QUIET = Option("quiet", Flag(), "No progress bar.", default=True, short="-q", in_catalog=False)
VERBOSE = Option(
    "verbose",
    Flag(),
    "Log each step to stderr, with times.",
    default=False,
    short="-v",
    in_python=False,
    in_catalog=False,
)
#: What every command that works for a while has at the end of its help page.
TALK = Group((JSON, FORCE, VERBOSE, QUIET), (Excludes("verbose", "quiet"),))
MESSAGE = Option("message", Text(), "Title of the commit.", fallback="Upload with mapconv", short="-m", metavar="TEXT")

PRIVATE = Option("private", Flag(), "Create the repository private; refused if it exists and is public.", default=False)
REVISION = Option("revision", Text(), "Branch to commit to, created if needed.", fallback="main", metavar="BRANCH")
LICENSE = Option(
    "license", Text(), "Licence for the card. Default: what the source's or the base's card says.", metavar="ID"
)
BASE_ID = Option(
    "base_id", Text(), "The base model's name on the Hub, if the result was made from a folder.", metavar="HUB_ID"
)


def _as_many_weights(given: Mapping[str, Any], spell: Spell) -> str | None:
    weights = given.get("weights")
    if weights is None:
        return None
    adapters = given["adapters"]
    named = adapters if isinstance(adapters, list | tuple) else [adapters]
    if len(weights) == len(named):
        return None
    text = f"{spell('weights', ...)} has {len(weights)} number{'s' * (len(weights) > 1)} for {len(named)} adapters"
    # `--weights 0.5 0.5`: all numbers but the first were taken for adapters.
    numbers = [str(name) for name in named if re.fullmatch(r"[-+]?[0-9.]+(e[-+]?[0-9]+)?", str(name))]
    together = ",".join([*(f"{weight:g}" for weight in weights), *numbers])
    return f"{text}: separate them with commas ({spell('weights', together)})" if numbers else text


WEIGHTS = Option(
    "weights",
    Reals(),
    "A factor for each adapter's update, separated by commas. Default: 1 for each.",
    metavar="W,W,...",
    in_catalog=False,
    refusal="an entry merges one adapter",
)
AS_MANY_WEIGHTS = Check(("weights", "adapters"), _as_many_weights)
