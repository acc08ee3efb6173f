"""Which errors another attempt may cure, which stop the whole run, and what the ledger says of each."""

from __future__ import annotations

import errno

from mapconv.errors import DiskFullError, HubError

#: Attempts at one entry where the fault may pass, and the first wait between two of them in seconds; it doubles.
ATTEMPTS = 3
FIRST_WAIT = 1.0
#: No entry that comes after can be written either.
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
#: A disk or network share that hiccups, a server that restarts, too many open files for a moment.
_PASSING = {
    errno.EIO, errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ETIMEDOUT,
    errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN,
    getattr(errno, "EREMOTEIO", errno.EIO),  # Linux's own
}  # fmt: skip


def is_transient(error: BaseException) -> bool:
    """Whether the same work may succeed a moment later: the network, or a disk that is reached through one."""
    if isinstance(error, HubError):
        return error.transient
    return isinstance(error, OSError) and error.errno in _PASSING


def stops_the_run(error: BaseException) -> bool:
    """Whether every other entry would fail for the same reason: there is nowhere to write to."""
    return isinstance(error, DiskFullError) or (isinstance(error, OSError) and error.errno in _DISK_FULL)
