"""What to tell a user of any error: one sentence."""

from __future__ import annotations

import errno

from mapconv.errors import MapconvError

#: What to say of an operating system's refusal, by its number.
_SYSTEM_ERRORS = {
    errno.ENOSPC: "no space left on the disk: make room and run the command again",
    errno.EDQUOT: "the disk quota is used up: make room and run the command again",
    errno.EACCES: "permission denied: change its permissions, or give another folder",
    errno.EPERM: "not permitted: change its permissions, or give another folder",
    errno.EROFS: "the file system is read-only: choose another output folder",
    errno.EFBIG: "the file is larger than this file system or a limit of this shell allows",
}


def sentence(error: Exception) -> str:
    """What to tell a user of any error."""
    if isinstance(error, MapconvError):
        return str(error)
    if isinstance(error, OSError):
        reason = _SYSTEM_ERRORS.get(error.errno) or error.strerror or str(error)
        return f"{error.filename}: {reason}." if error.filename else f"{reason}."
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "out of memory: close other programs, use --device cpu, or convert on a larger machine."
    if isinstance(error, ValueError):
        return f"{error}."
    lines = str(error).strip().splitlines() or [""]
    return (
        f"unexpected {type(error).__name__} ({lines[0][:200]}): this is a bug in mapconv; run again with "
        "MAPCONV_DEBUG=1 and report the traceback."
    )
