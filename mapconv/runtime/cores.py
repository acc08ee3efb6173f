"""How many of the machine's cores this process uses."""

from __future__ import annotations

import os

_cores: int | None = None


def limit_cores(count: int) -> None:
    """Use at most ``count`` cores in this process, which shares the machine with others of its kind."""
    global _cores
    import torch

    _cores = count
    torch.set_num_threads(count)


def core_count() -> int:
    """The cores that this process may use."""
    if _cores is None and hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return _cores or os.cpu_count() or 1
