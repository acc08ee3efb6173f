"""How much room a folder takes on the disk while something works in it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def peak_of(folder: Path, *, every: float) -> Iterator[list[int]]:
    """The most bytes that ``folder`` takes, holes left out, looked at ``every`` so many seconds."""
    peak, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(every):
            files = [os.path.join(root, name) for root, _, names in os.walk(folder) for name in names]
            peak[0] = max(peak[0], sum(map(_taken, files)))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def _taken(path: str) -> int:
    try:
        return os.lstat(path).st_blocks * 512
    except FileNotFoundError:
        return 0
