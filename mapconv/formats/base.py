"""What a dialect of adapter files must offer, and what it may look at to recognise its own."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from mapconv.adapter import Adapter
from mapconv.checkpoint.headers import TensorFile, read_tensor_file
from mapconv.formats.config import read_config

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


class Found:
    """What lies at a path, a folder or a single weights file: read when it is asked for, and once."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def config(self) -> dict[str, Any] | None:
        """The table in the folder's ``adapter_config.json``, or None where there is none.

        Raises:
            AdapterError: unreadable, or no JSON object.
        """
        path = self.path / CONFIG_FILE
        return read_config(path) if path.is_file() else None

    @cached_property
    def header(self) -> TensorFile | None:
        """Names, shapes and metadata of the weights file, PEFT's or the first one there; None where there is none.

        Raises:
            CheckpointError: no safetensors file, whatever its name says.
        """
        files = (
            [self.path] if self.path.is_file() else [self.path / WEIGHTS_FILE, *sorted(self.path.glob("*.safetensors"))]
        )
        path = next((path for path in files if path.suffix == ".safetensors" and path.is_file()), None)
        return None if path is None else read_tensor_file(path)


class Dialect(Protocol):
    """One way of writing an adapter to disk."""

    def recognise(self, found: Found) -> bool:
        """Whether this is written in the dialect, by file names, the configuration or the header's keys alone."""
        ...

    def read(self, found: Found, *, allow_pickle: bool = False) -> Adapter:
        """The adapter's records, validated as far as that goes without the base model; pickles only if allowed."""
        ...
