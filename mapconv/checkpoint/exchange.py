"""Put a finished folder in the place of an old one, which keeps a name until its successor has its own.

The two are exchanged in one step where the system knows one (Linux's ``renameat2``). Elsewhere the old result steps
aside for a moment: what interrupts that puts it back, and after a kill the next run to the same place does.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import uuid
from pathlib import Path

from mapconv.errors import OutputError

#: Bytes of a name that a hidden sibling keeps, so that the longest ending fits in the 255 that file systems allow.
_LONGEST_NAME = 220
#: <linux/fs.h> and <fcntl.h>.
_RENAME_EXCHANGE, _AT_FDCWD = 2, -100
#: What the kernel answers for a file system that cannot exchange, or where it does not know the call.
_NO_EXCHANGE = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}


def hidden_sibling(path: Path, ending: str) -> Path:
    """``.NAME.ENDING`` beside ``path``, for what becomes that path; a long name is cut, and told apart by a hash."""
    name = os.fsencode(path.name)
    if len(name) > _LONGEST_NAME:
        digest = hashlib.blake2b(name, digest_size=8).hexdigest()
        name = name[: _LONGEST_NAME - len(digest) - 1].decode(errors="ignore").encode() + f"~{digest}".encode()
    return path.parent / f".{os.fsdecode(name)}{ending}"


def put_in_place(staging: Path, out: Path, *, force: bool) -> None:
    """Give a folder the name ``out``; with ``force`` an old result of that name has the folder's afterwards.

    Raises:
        OutputError: the name is taken, without ``force``.
    """
    if force and os.path.lexists(out):
        if not _exchanged(staging, out):
            _replace_in_two_steps(staging, out)
        return  # the old result is the staging folder now
    try:
        staging.rename(out)
    except OSError:
        if out.exists():
            raise OutputError(f"{out} was created in the meantime: pass --force to replace it.") from None
        raise


def take_back(staging: Path, out: Path) -> None:
    """Undo ``put_in_place``: the old result has its name again, where there was one."""
    if not os.path.lexists(staging):
        out.rename(staging)
    elif not _exchanged(staging, out):
        _replace_in_two_steps(staging, out)


def _exchanged(staging: Path, out: Path) -> bool:
    """Let the two folders change names in one step; False where that cannot be done."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # another system, or a C library without it
        return False
    if rename(_AT_FDCWD, os.fsencode(staging), _AT_FDCWD, os.fsencode(out), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(out))


def _replace_in_two_steps(staging: Path, out: Path) -> None:
    aside = hidden_sibling(out, f".replaced-{token()}")
    try:
        out.rename(aside)
        staging.rename(out)
    finally:
        # Whatever came between the two, also Ctrl-C: the old result has its name again, or the new one has it.
        if os.path.lexists(aside):
            aside.rename(staging if os.path.lexists(out) else out)


def token() -> str:
    """What tells one run's hidden siblings from another's."""
    return uuid.uuid4().hex[:8]
