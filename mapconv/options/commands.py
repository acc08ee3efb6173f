"""Every command's options and rules, which is all that the three views know of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mapconv.options.kinds import (
    Choice,
    File,
    Flag,
    Folder,
    Real,
    Repository,
    Source,
    Text,
    Whole,
)
from mapconv.options.making import CALIBRATE, REBASE, STATISTICS_COMMAND, UPGRADE
from mapconv.options.merging import MERGE
from mapconv.options.records import Command, Option
from mapconv.options.rules import Check, Excludes, Spell
from mapconv.options.shared import (
    AGAINST,
    ALLOW_PICKLE,
    BASE,
    BASE_ID,
    DATA,
    DEVICE,
    DORA_AXIS,
    DORA_NORM,
    DRY_RUN,
    DTYPE,
    FORCE,
    JSON,
    LICENSE,
    MESSAGE,
    OUT,
    PRIVATE,
    QUIET,
    REVISION,
    SAMPLES,
    SOURCE,
    VERBOSE,
)
from mapconv.options.surgery import COMBINE, EXTRACT

INSPECT = Command("inspect", SOURCE, BASE, DORA_AXIS, DORA_NORM, ALLOW_PICKLE, JSON)

VERIFY = Command(
    "verify",
    Option("result", Source(), positional=True, required=True, in_catalog=False),
    AGAINST.but(help="What it was made from: a LoRA or DoRA adapter, or a finetuned model."),
    BASE,
    Option(
        "against_base",
        Source(),
        "Base that SOURCE runs on. Default: that of RESULT, or of a rebased one what SOURCE names.",
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


PUSH = Command(
    "push",
    Option("path", Folder(), positional=True, required=True, in_catalog=False),
    Option("repo_id", Repository(), positional=True, required=True),
    PRIVATE,
    REVISION,
    Option("create_pr", Flag(), "Open a pull request instead of committing.", default=False),
    MESSAGE,
    LICENSE,
    BASE_ID,
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
        INSPECT, UPGRADE, REBASE, EXTRACT, COMBINE, STATISTICS_COMMAND, CALIBRATE, VERIFY, REPORT, MERGE, PUSH,
        CATALOG_RUN, CATALOG_STATUS, DEMO, ENV,
    )
}  # fmt: skip
