"""Push what was written to the disk while more is computed, so that the wait at the end is short."""

from __future__ import annotations

import os
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor

#: Flushed in pieces of about this size: large enough for a disk, and little is left at the end.
FLUSH_BYTES = 128 << 20


class BackgroundFlush:
    """Flushes files in a thread of its own, one at a time. Use it as a context manager, which waits for the last."""

    def __init__(self) -> None:
        self._written: Counter[int] = Counter()
        self._running: dict[int, Future[None]] = {}
        self._pool = ThreadPoolExecutor(1)

    def __enter__(self) -> BackgroundFlush:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            for flushed in self._running.values():
                flushed.result()

    def wrote(self, descriptor: int, nbytes: int) -> None:
        """Count bytes that were written.

        Raises:
            OSError: an earlier flush met a full or broken disk.
        """
        self._written[descriptor] += nbytes
        running = self._running.get(descriptor)
        if self._written[descriptor] < FLUSH_BYTES or not (running is None or running.done()):
            return
        if running is not None:
            running.result()
        self._written[descriptor] = 0
        self._running[descriptor] = self._pool.submit(_flush, descriptor)


def _flush(descriptor: int) -> None:
    os.fdatasync(descriptor)
