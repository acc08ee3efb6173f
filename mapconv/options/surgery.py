"""The options and rules of the commands that take weights apart and put them together: extract."""

from __future__ import annotations

from mapconv.options.kinds import Names, Source
from mapconv.options.records import Command, Option
from mapconv.options.rules import Excludes, Requires
from mapconv.options.shared import (
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
)

#: What is right for most finetunes: PEFT's own default is 8, and published LoRAs mostly have 16 to 64.
EXTRACT_RANK = RANK.but(help="Rank of the result.", fallback=16)

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
        *(Requires(name, "data") for name in ("samples", "sequence_length", "statistics")),
    ),
)
