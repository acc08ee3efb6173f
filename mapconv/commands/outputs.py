"""Where a command writes when it is not told."""

from __future__ import annotations

from pathlib import Path

from mapconv.checkpoint.filenames import ADAPTER_FILES
from mapconv.hub.locate import hub_reference


def output_beside(source: str | Path, suffix: str) -> Path:
    """``<source>-<suffix>`` beside the source; for one from the Hub, its name alone, in the current folder."""
    reference = hub_reference(source)
    if reference is not None:
        return Path(f"{reference.name}-{suffix}")
    source = Path(source)
    if source.is_file():
        source = source.parent if source.name in ADAPTER_FILES else source.with_suffix("")
    resolved = source.resolve()
    return resolved.parent / f"{resolved.name}-{suffix}" if source.name in ("", "..") else Path(f"{source}-{suffix}")
