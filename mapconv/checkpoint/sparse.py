"""Give back the room that a part of a file takes on the disk: what is read there afterwards is zeros."""

from __future__ import annotations

import ctypes
import os
import tempfile
from pathlib import Path

#: <linux/falloc.h>: keep the file's size, and free whole blocks of the range.
_KEEP_SIZE, _PUNCH_HOLE = 1, 2


def punch_hole(descriptor: int, start: int, stop: int) -> None:
    """Free the bytes [start, stop) of a file that is open for writing.

    Raises:
        OSError: the file system cannot, or the system has no call for it.
    """
    try:
        fallocate = ctypes.CDLL(None, use_errno=True).fallocate
    except AttributeError:  # another system than Linux
        raise OSError("this system cannot free a part of a file") from None
    offsets = ctypes.c_int64(start), ctypes.c_int64(stop - start)
    if stop > start and fallocate(descriptor, _PUNCH_HOLE | _KEEP_SIZE, *offsets):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def can_punch(folder: Path) -> bool:
    """Whether the file system of ``folder`` frees parts of files."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(1 << 16))
        file.flush()
        try:
            punch_hole(file.fileno(), 0, 1 << 15)
        except OSError:
            return False
    return True
