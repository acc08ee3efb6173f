"""Push what was written to the disk while more is computed, so that the wait at the end is short."""

from __future__ import annotations

import ctypes
import os
import sys
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor

#: Flushed in pieces of about this size: large enough for a disk, and little is left at the end.
FLUSH_BYTES = 128 << 20
#: ``SYNC_FILE_RANGE_WRITE`` in Linux's fs.h.
_WRITE = 2
_size = ctypes.c_longlong


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
        self._running[descriptor] = self._pool.submit(flush_data, descriptor)


def begin_flush(descriptor: int, start: int = 0, nbytes: int = 0) -> None:
    """Have the system begin to write bytes of a file (0: all from ``start`` on) to the disk, without waiting for it.

    It promises nothing: the flush at the end does, and is short then. Other systems than Linux have no call for it.
    """
    if _sync_file_range is not None:
        _sync_file_range(descriptor, _size(start), _size(nbytes), _WRITE)


_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None) if sys.platform == "linux" else None


def flush_data(descriptor: int) -> None:
    """Push a file's content to the disk; macOS has no call that leaves out its times."""
    getattr(os, "fdatasync", os.fsync)(descriptor)
