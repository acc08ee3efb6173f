"""What a dialect of adapter files must offer, and what it may look at to recognise its own.

A dialect reads alone. What is written goes the other way through other records: a reader makes an ``Adapter`` from
names and shapes and knows no base, while a writer (``mapconv.exporting``) starts from modules that are placed on a base
and refitted to what the format and its server hold. The two share no more than a format's names and constants, six of
the formats are written and twice as many read, so that a ``write`` here would have one caller and need half of the
program below it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from mapconv.adapter import Adapter, LoraSettings, Module
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


def adapter_of(path: Path, modules: Sequence[Module], dialect: str, *, base: str | None = None) -> Adapter:
    """The adapter of a language model whose modules say themselves what their rank and scaling are.

    Args:
        path: its folder or file.
        modules: under transformers' names.
        dialect: the writer's name for the form of the files.
        base: the model that it names.
    """
    dora = any(module.magnitude is not None for module in modules)
    return Adapter(
        path=path,
        method="DoRA" if dora else "LoRA",
        config={"task_type": "CAUSAL_LM", "target_modules": [module.path for module in modules]},
        settings=LoraSettings.of_modules(dora=dora),
        modules=tuple(modules),
        whole=(),
        others={},
        base=base,
        revision=None,
        dialect=dialect,
    )
