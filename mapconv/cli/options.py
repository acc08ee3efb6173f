"""Options and parameter types that several commands share."""

from __future__ import annotations

import math
import re
from pathlib import Path

import click

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class ShardSize(click.ParamType):
    """``keep`` or a size such as ``5GB``; None stands for ``keep``."""

    name = "keep|SIZE"

    def convert(self, value, param, context):
        if value is None or isinstance(value, int):
            return value
        if value == "keep":
            return None
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?b)?", value.strip(), re.IGNORECASE)
        size = int(float(match[1]) * _UNITS[(match[2] or "").upper()]) if match else 0
        if size < 1:
            self.fail(f"{value!r} is neither 'keep' nor a size such as 5GB.", param, context)
        return size


class Numbers(click.ParamType):
    """Numbers with commas between them: ``0.7,0.3``."""

    name = "NUMBERS"

    def convert(self, value, param, context):
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(float(part) for part in value.split(","))
        except ValueError:
            numbers = ()
        if not numbers or not all(math.isfinite(number) for number in numbers):
            self.fail(f"{value!r} is no list of numbers such as 0.7,0.3.", param, context)
        return numbers


FOLDER = click.Path(path_type=Path)
#: A folder or a Hub reference, as it was typed: a Path would forget the ``./`` that tells the two apart.
SOURCE = click.STRING

base = click.option(
    "--base",
    metavar="BASE",
    help="Base model: a folder, a Hub id, or original. Default: what the adapter's config names.",
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
quiet = click.option("--quiet", "-q", is_flag=True, help="No progress bar.")
force = click.option("--force", is_flag=True, help="Replace OUT if it exists.")
allow_pickle = click.option(
    "--allow-pickle", is_flag=True, help="Read .bin files too (pickles, opened with torch's weights-only loader)."
)
dry_run = click.option("--dry-run", is_flag=True, help="Check everything, show the plan, write nothing.")
device = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where the heavy arithmetic runs.",
)
