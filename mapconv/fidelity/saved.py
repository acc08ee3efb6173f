"""The report of ``verify``, stored beside what it was measured on (``verify.json``)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mapconv.checkpoint.index import read_checkpoint
from mapconv.checkpoint.staging import replace_file
from mapconv.errors import AdapterError, OutputError
from mapconv.files import open_regular
from mapconv.formats.mapdir import FORMAT_VERSION, SERVED
from mapconv.formats.peft import WEIGHTS_FILE
from mapconv.hub.reference import origin_of
from mapconv.jsonfile import finite, read_object
from mapconv.metadata.card import REPORT_FILE
from mapconv.untrusted.schema import COUNT, NULL, NUMBER, TEXT, with_nulls

_REPORT = {
    "format_version": COUNT,
    "weights": TEXT,
    "tokens": (COUNT, NULL),
    "modules": [{"path": TEXT, "error": (NUMBER, NULL)}],
    "served": (SERVED, NULL),
    **dict.fromkeys(
        (
            *("kl", "kl_largest", "kl_base", "top1_agreement", "largest_logit_difference"),
            *("perplexity_base", "perplexity_source", "perplexity_result", "seconds"),
        ),
        (NUMBER, NULL),
    ),
}
_LOCAL = ("result", "source", "base")


def check_report_place(folder: Path) -> None:
    """Refuse, before anything is measured, a folder that a report cannot be stored in.

    Raises:
        OutputError: a copy in the Hub's cache, or no permission.
    """
    if origin_of(folder) is not None:
        raise OutputError(f"{folder} is a copy in the Hub's cache: --save needs a result in a folder of its own.")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"no permission to write in {folder}: --save needs it.")


def save_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Write the report without this machine's paths, whole or not at all."""
    table = {key: value for key, value in report.items() if key not in _LOCAL}
    table = {"format_version": FORMAT_VERSION, "weights": weights_mark(folder)} | finite(table)
    replace_file(folder / REPORT_FILE, (json.dumps(table, indent=2, allow_nan=False) + "\n").encode())


def read_report(folder: Path) -> dict[str, Any] | None:
    """The stored report, or None without one.

    Raises:
        AdapterError: broken, or measured on other weights than the folder now holds.
    """
    path = folder / REPORT_FILE
    if not os.path.lexists(path):
        return None
    again = f"run `mapconv verify {folder} --against SOURCE --save` again, or delete the file."
    report = read_object(path, AdapterError, schema=_REPORT, advice=again.removesuffix("."))
    report = with_nulls(report, _REPORT)
    if not report["modules"]:
        raise AdapterError(f"{path} has no modules: {again}")
    if report["format_version"] != FORMAT_VERSION:
        raise AdapterError(f"{path} was written by another version of mapconv: {again}")
    if report["weights"] != weights_mark(folder):
        raise AdapterError(f"{path} was measured on other weights than the folder now holds: {again}")
    return report


def weights_mark(folder: Path) -> str:
    """What ties a report to its weights: an adapter's SHA-256; of a model, which may be huge, names and sizes alone.

    ``merge`` replaces a model's folder as a whole, so a report does not outlive the weights that it was measured on.
    """
    digest = hashlib.sha256()
    adapter = folder / WEIGHTS_FILE
    if os.path.lexists(adapter):
        with open_regular(adapter, AdapterError) as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    else:
        for ref in read_checkpoint(folder).tensors.values():
            digest.update(f"{ref.file.name} {ref.name} {ref.dtype} {ref.shape} {ref.start}\n".encode())
    return f"sha256:{digest.hexdigest()}"
