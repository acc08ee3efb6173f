"""A base and its adapters in one PEFT model: run either."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def without_adapters(model: Any) -> Iterator[None]:
    """Run the base inside a ``PeftModel`` whose adapters are all enabled.

    PEFT's own ``disable_adapter`` does the same, and first asks each layer for the status of each of its adapters.
    """
    layers = model.base_model
    layers.disable_adapter_layers()
    try:
        yield
    finally:
        layers.enable_adapter_layers()
