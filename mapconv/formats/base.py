"""What a dialect of adapter files must offer."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from mapconv.adapter import Adapter


class Dialect(Protocol):
    """One way of writing an adapter to disk."""

    def detect(self, path: Path) -> bool:
        """Whether ``path`` is written in this dialect; cheap, and false for anything doubtful."""

    def read(self, path: Path, *, allow_pickle: bool = False) -> Adapter:
        """The adapter's records, validated as far as that goes without the base model; pickles only if allowed."""
