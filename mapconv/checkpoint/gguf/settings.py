"""The metadata of one architecture in a GGUF file, each value of the type that is asked for."""

from __future__ import annotations

import math
import struct
from typing import Any

from mapconv.checkpoint.gguf.header import GgufFile
from mapconv.errors import CheckpointError


class Settings:
    """``ARCHITECTURE.key`` of the metadata by ``key``."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.architecture: str = file.metadata["general.architecture"]

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number that is no less than 0."""
        value = self.find(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or value < 0:
            raise CheckpointError(
                f"{self.file.path} has {self.architecture}.{key} {self._shown(value)}, expected one number for the "
                "whole model: give the 16-bit or 32-bit model with --base."
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.find(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise CheckpointError(
                f"{self.file.path} has {self.architecture}.{key} {self._shown(value)}, expected a number: give the "
                "16-bit or 32-bit model with --base."
            )
        # Stored in 32 bits: the shortest decimal that is this float32 is what was meant.
        return _shortest(value) if isinstance(value, float) else value

    def find(self, key: str) -> Any:
        return self.file.metadata.get(f"{self.architecture}.{key}")

    @staticmethod
    def _shown(value: Any) -> str:
        return "of another length for each layer" if isinstance(value, list) else repr(value)


def _shortest(value: float) -> float:
    """The decimal of fewest digits that float32 rounds to ``value``."""
    for digits in range(1, 10):
        short = float(f"{value:.{digits}g}")
        if struct.pack("<f", short) == struct.pack("<f", value):
            return short
    return value
