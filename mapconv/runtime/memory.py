"""Memory between two stages of a command, so that the second does not stand beside what is left of the first."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys


def release_freed() -> None:
    """Collect what refers to itself in circles, and give the system back what was freed."""
    gc.collect()
    trim()


def trim() -> None:
    """Give the system back what was freed, in about a millisecond.

    glibc keeps freed memory for the next request, and what a stage leaves between the pieces that live on fits none of
    the larger ones that follow.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)
