"""One run at a time writes to an output folder; the lock dies with its processes, whatever kills them."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mapconv.errors import OutputError

#: How long the workers of a killed run may take to notice, in seconds.
PATIENCE = 10.0


@contextmanager
def run_lock(path: Path) -> Iterator[int]:
    """Hold the lock file; yields its descriptor, which worker processes inherit: it is held until all have ended.

    Raises:
        OutputError: another run holds it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        deadline = time.monotonic() + PATIENCE
        while not _try(descriptor, fcntl.LOCK_EX):
            owner = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            if not _is_dead(owner) or time.monotonic() > deadline:
                raise OutputError(
                    f"another run writes to {path.parent.parent} (process {owner or 'unknown'}): wait for it, or "
                    "choose another output folder."
                )
            time.sleep(0.02)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield descriptor
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Whether a run is going on."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        return not _try(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def _try(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_dead(owner: str) -> bool:
    """Whether the process that wrote the lock has ended, so that only its workers can still hold it."""
    number, _, host = owner.partition(" on ")
    if not number.isdigit():
        return True  # it has not got so far as to write its number, or a reader of the status has it for a moment
    if host != socket.gethostname():
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False
