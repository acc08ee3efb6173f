"""The options and rules of the command that writes adapters for other programs: export."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mapconv.options.kinds import Choice, Flag, Folder
from mapconv.options.records import Command, Option
from mapconv.options.rules import Check, Excludes, Requires, Spell
from mapconv.options.shared import (
    ALLOW_PICKLE,
    BASE,
    DEVICE,
    DORA_AXIS,
    DORA_NORM,
    DRY_RUN,
    DTYPE,
    MAX_RANK,
    OUT,
    RANK,
    SOURCE,
    TALK,
    TOLERANCE,
)

FORMATS = ("peft", "diffusers", "kohya", "comfyui", "mlx", "gguf")
SERVER_NAMES = ("vllm", "sglang", "tensorrt-llm", "llama.cpp", "ollama", "comfyui", "lorax")


def _something_to_do(given: Mapping[str, Any], spell: Spell) -> str | None:
    if "to" in given or "server" in given:
        return None
    return f"{spell('to', ...)} or {spell('server', ...)} is required"


def _somewhere_to_write(given: Mapping[str, Any], spell: Spell) -> str | None:
    if "out" in given or "check" in given:
        return None
    return f"{spell('out', ...)} is required, but with {spell('check', ...)}"


EXPORT = Command(
    "export",
    SOURCE.but(metavar="ADAPTER"),
    Option(
        "to", Choice(FORMATS), "Format to write. Default: the one that the server of --for reads.", in_catalog=False
    ),
    Option(
        "server",
        Choice(SERVER_NAMES),
        "Keep to what this server loads: plain LoRA, one rank, no patterns, and so on.",
        spelling="--for",
        in_catalog=False,
    ),
    OUT.but(help="Folder or file to write."),
    BASE,
    Option(
        "check",
        Flag(),
        "Only say whether the server of --for would load ADAPTER as it is; exit 1 if not.",
        default=False,
        in_catalog=False,
    ),
    Option(
        "fold_into",
        Folder(),
        "Merge what the format cannot hold (heads, embeddings, biases, experts) into the base, written here.",
        metavar="BASE_OUT",
        in_catalog=False,
    ),
    Option(
        "experts",
        Choice(("split", "fused", "tinker", "sglang")),
        "Layout of experts in a PEFT folder: one LoRA for each, PEFT's target_parameters, or 3-D stacks. Default: the "
        "source's, or what the server of --for reads.",
        in_catalog=False,
    ),
    RANK.but(help="Rank of the result. Default: the source's own; a DoRA is refitted at it."),
    TOLERANCE,
    MAX_RANK,
    DTYPE,
    DEVICE,
    DORA_AXIS,
    DORA_NORM,
    ALLOW_PICKLE,
    DRY_RUN.but(help="Do all but write: show what would be exact, refitted and refused."),
    TALK,
    rules=(
        Check(("to", "server"), _something_to_do),
        Check(("out", "check"), _somewhere_to_write),
        Requires("check", "server"),
        *(
            Excludes("check", name, "it writes nothing")
            for name in ("out", "to", "fold_into", "experts", "rank", "tolerance", "base", "dry_run")
        ),
        Excludes("rank", "tolerance"),
        Requires("max_rank", "tolerance"),
    ),
)
