"""Every command's options and rules, which is all that the three views know of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mapconv.options.kinds import (
    Choice,
    File,
    Flag,
    Folder,
    Real,
    Reals,
    Repository,
    Size,
    Source,
    Text,
    Whole,
)
from mapconv.options.making import CALIBRATE, REBASE, STATISTICS_COMMAND, UPGRADE
from mapconv.options.records import Command, Option
from mapconv.options.rules import Check, Excludes, Spell
from mapconv.options.shared import (
    AGAINST,
    ALLOW_PICKLE,
    BASE,
    DATA,
    DEVICE,
    DORA_AXIS,
    DORA_NORM,
    DRY_RUN,
    DTYPE,
    FORCE,
    JSON,
    LEAST_SHARD,
    MESSAGE,
    OUT,
    QUIET,
    SAMPLES,
    SOURCE,
    VERBOSE,
)
from mapconv.options.surgery import EXTRACT

INSPECT = Command("inspect", SOURCE, BASE, DORA_AXIS, DORA_NORM, ALLOW_PICKLE, JSON)

VERIFY = Command(
    "verify",
    Option("result", Source(), positional=True, required=True, in_catalog=False),
    AGAINST.but(help="What it was made from: a LoRA or DoRA adapter, or a finetuned model."),
    BASE,
    Option(
        "against_base",
        Source(),
        "Base that SOURCE runs on, if it is not the base of RESULT. Default: the same.",
        metavar="BASE",
        in_catalog=False,
    ),
    DATA.but(help="Text, .jsonl or .parquet to run on. Default: a text that ships with mapconv."),
    SAMPLES.but(help="Sequences of 256 tokens to run.", default=8, fallback=None),
    Option(
        "max_kl",
        Real(least=0),
        "Exit with status 1 if the mean KL divergence is above X.",
        metavar="X",
        in_python=False,
        in_catalog=False,
    ),
    DTYPE.but(kind=Choice(("float32", "bfloat16", "float16")), help="Dtype that the models compute in."),
    DEVICE,
    Option("save", Flag(), "Store the report in RESULT, for the model card that `mapconv push` writes.", default=False),
    ALLOW_PICKLE,
    JSON,
    VERBOSE,
    QUIET,
    rules=(Excludes("verbose", "quiet"),),
)

REPORT = Command(
    "report",
    Option("path", Folder(), positional=True, required=True),
    OUT.but(kind=File(), metavar="FILE", help="HTML file to write. Default: PATH-report.html beside PATH."),
    Option(
        "png",
        File(),
        "Also write the heat maps or distributions as one picture; needs matplotlib.",
        metavar="FILE",
    ),
    JSON,
    FORCE.but(help="Replace the files if they exist."),
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


def _measured_base(given: Mapping[str, Any], spell: Spell) -> str | None:
    chosen = given.get("base_values")
    if "original" in given and chosen not in ("original", "measured"):
        return f"{spell('original', ...)} requires {spell('base_values', 'original')} or measured"
    for name in ("data", "samples"):
        if name in given and chosen != "measured":
            return f"{spell(name, ...)} requires {spell('base_values', 'measured')}"
    return None


def _copied_codes(given: Mapping[str, Any], spell: Spell) -> str | None:
    if given.get("quantized") == "copy" and given.get("dtype", "auto") != "auto":
        copied = spell("quantized", "copy")
        return f"weights that are copied in codes keep their dtype: {copied} requires {spell('dtype', 'auto')}"
    return None


MERGE = Command(
    "merge",
    Option("adapters", Source(), metavar="ADAPTER", positional=True, many=True, required=True, in_catalog=False),
    BASE,
    OUT.but(required=True, help="Folder to write the merged model to."),
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
    Option(
        "weights",
        Reals(),
        "A factor for each adapter's update, separated by commas. Default: 1 for each.",
        metavar="W,W,...",
        in_catalog=False,
        refusal="an entry merges one adapter",
    ),
    Option(
        "quantized",
        Choice(("dequantize", "copy")),
        "For a quantized base: write plain weights, or copy the codes of unchanged weights.",
        default="dequantize",
    ),
    Option(
        "base_values",
        Choice(("original", "stored", "measured")),
        "Of a quantized base: merge into its stored values, the original model, or what --data is likelier under.",
    ),
    Option(
        "original",
        Source(),
        "The model that a quantized base was made from, for --base-values. Default: what its card names.",
        metavar="BASE",
    ),
    DATA.but(help="Text, .jsonl or .parquet that --base-values measures on. Default: a text that ships with mapconv."),
    SAMPLES.but(help="Sequences of 256 tokens of it.", fallback=8),
    DORA_AXIS,
    DORA_NORM,
    ALLOW_PICKLE,
    DRY_RUN,
    JSON,
    FORCE.but(help="Replace OUT if it exists, and accept a base other than the one that a MAP adapter was made for."),
    VERBOSE,
    QUIET,
    rules=(
        Check(("weights", "adapters"), _as_many_weights),
        Check(("quantized", "dtype"), _copied_codes),
        Check(("base_values", "original", "data", "samples"), _measured_base),
        Excludes("verbose", "quiet"),
    ),
)

PUSH = Command(
    "push",
    Option("path", Folder(), positional=True, required=True, in_catalog=False),
    Option("repo_id", Repository(), positional=True, required=True),
    Option("private", Flag(), "Create the repository private; refused if it exists and is public.", default=False),
    Option("revision", Text(), "Branch to commit to, created if needed.", fallback="main", metavar="BRANCH"),
    Option("create_pr", Flag(), "Open a pull request instead of committing.", default=False),
    MESSAGE,
    Option(
        "license", Text(), "Licence for the card. Default: what the source's or the base's card says.", metavar="ID"
    ),
    Option(
        "base_id",
        Text(),
        "The base model's name on the Hub, if the result was made from a folder.",
        metavar="HUB_ID",
    ),
    Option(
        "token",
        Text(),
        "Default: HF_TOKEN, or the token of `hf auth login`.",
        metavar="TOKEN",
        in_catalog=False,
        refusal="set HF_TOKEN instead, a file is not the place for it",
    ),
    DRY_RUN.but(help="Check everything, show what would be sent, open no connection."),
    JSON,
    Option(
        "yes",
        Flag(),
        "Do not ask before sending. Without a terminal nothing is asked.",
        default=False,
        short="-y",
        in_python=False,
        in_catalog=False,
    ),
    QUIET,
)


def _one_engine(given: Mapping[str, Any], spell: Spell) -> str | None:
    engine = given.get("engine")
    if engine == "serial" and given.get("workers", 1) > 1:
        return f"{spell('engine', 'serial')} has one worker: use {spell('engine', 'process')} for more"
    if "ray_address" in given and engine not in (None, "ray"):
        return f"{spell('ray_address', ...)} requires {spell('engine', 'ray')}"
    return None


CATALOG_RUN = Command(
    "catalog run",
    Option("catalog", File(), positional=True, required=True),
    OUT.but(required=True, help="Folder to write to, with a folder for each adapter."),
    Option(
        "engine",
        Choice(("serial", "process", "ray")),
        "Where adapters are converted. Default: serial, or process with more than one worker.",
    ),
    Option("workers", Whole(), "Processes that convert. Default: 1, or the number of cores.", metavar="N"),
    Option("ray_address", Text(), "A Ray cluster. Default: Ray on this machine, for this run.", metavar="ADDRESS"),
    Option("limit", Whole(), "Convert at most N adapters in this run.", metavar="N"),
    Option("only", Text(), "Convert only entries whose output matches, such as 'poems-*'.", metavar="PATTERN"),
    Option("retry_failed", Flag(), "Try failed entries again even if nothing changed.", default=False),
    Option("push_to", Text(), "Publish each result on the Hub as ORG/OUTPUT.", metavar="ORG"),
    Option("verify", Flag(), "Measure each result against its source, and record the KL divergence.", default=False),
    JSON,
    QUIET,
    rules=(Check(("engine", "workers", "ray_address"), _one_engine),),
)

CATALOG_STATUS = Command(
    "catalog status",
    Option("out", Folder(), positional=True, required=True),
    Option("watch", Flag(), "Refresh every second until the run ends.", default=False, in_python=False),
    JSON,
)

DEMO = Command(
    "demo", Option("folder", Folder(), default="mapconv-demo", metavar="[DIR]", positional=True), FORCE, QUIET
)
ENV = Command("env", JSON)

#: By name, for a catalog's stages and the tests.
COMMANDS = {
    command.name: command
    for command in (
        INSPECT, UPGRADE, REBASE, EXTRACT, STATISTICS_COMMAND, CALIBRATE, VERIFY, REPORT, MERGE, PUSH, CATALOG_RUN,
        CATALOG_STATUS, DEMO, ENV,
    )
}  # fmt: skip
