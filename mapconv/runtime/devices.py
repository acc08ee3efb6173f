"""Choose the device that heavy arithmetic runs on."""

from __future__ import annotations

from pathlib import Path

import torch

from mapconv.errors import DependencyError


def resolve_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one, else the CPU.

    Raises:
        DependencyError: CUDA was asked for and is absent.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise DependencyError("--device cuda was given, but torch sees no CUDA device: use --device cpu.")
    return torch.device(name)


def free_memory() -> int | None:
    """Bytes of memory that programs can have without swapping; None where the system does not say (not Linux)."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)
