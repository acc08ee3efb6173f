"""Files that others wrote: regular ones only, inside the folder that was named, and no longer than the caller expects.

A folder that came from elsewhere may hold a link to a private file, a device or a pipe under the name of a harmless
file. Everything that mapconv reads, copies or sends from such a folder is opened here, or checked here first.
"""

from __future__ import annotations

import os
import stat
from io import BufferedReader
from pathlib import Path

from mapconv.errors import MapconvError

#: What a configuration, a card or a tokenizer's settings may have; an index or a list of modules; a tokenizer's table.
SMALL, LARGE = 16 << 20, 256 << 20


def open_regular(path: Path, kind: type[MapconvError], *, folder: Path | None = None) -> BufferedReader:
    """Open a file to read its bytes.

    Args:
        path: the file.
        kind: the error to raise.
        folder: the folder that the file must lie in; None: its own.

    Raises:
        kind: no regular file, or a link that leaves ``folder``. FileNotFoundError, PermissionError: as open() does.
    """
    target = check_regular(path, kind, folder=folder)
    # O_NONBLOCK: a pipe that takes the file's place in between is opened, and refused below, without waiting for it.
    descriptor = os.open(target, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise kind(f"{path} is {_form(target)}, expected a regular file: put the file itself in its place.")
    return os.fdopen(descriptor, "rb")


def read_bytes(path: Path, kind: type[MapconvError], *, limit: int = SMALL, folder: Path | None = None) -> bytes:
    """The content of a file of at most ``limit`` bytes.

    Raises:
        kind: as ``open_regular``, or longer than ``limit``. FileNotFoundError, PermissionError: as open() does.
    """
    with open_regular(path, kind, folder=folder) as file:
        content = file.read(limit + 1)  # not its size: a file may grow
        if len(content) > limit:
            size = os.fstat(file.fileno()).st_size
            raise kind(f"{path} is {size:,} bytes long, expected at most {limit:,}: it is not what its name says.")
    return content


def check_regular(path: Path, kind: type[MapconvError], *, folder: Path | None = None) -> str:
    """Refuse what ``open_regular`` refuses, without opening it; where the file really lies."""
    if folder in (None, path.parent) and stat.S_ISREG(os.lstat(path).st_mode):
        # No link: it lies where its folder does, which is all that has to be resolved.
        return os.path.join(os.path.realpath(path.parent), path.name)
    target = os.path.realpath(path)
    if not stays_inside(target, path.parent if folder is None else folder):
        raise kind(
            f"{path} is a symbolic link that leaves its folder (to {target}): put the file itself in its place, or "
            "remove the link."
        )
    if not stat.S_ISREG(os.stat(target).st_mode):
        raise kind(f"{path} is {_form(target)}, expected a regular file: put the file itself in its place.")
    return target


def stays_inside(target: str, folder: Path) -> bool:
    """Whether a resolved path lies in ``folder``, or is what the Hub's cache keeps for the repository of ``folder``."""
    if _lies_in(target, folder):
        return True
    blobs = cached_blobs(folder)
    return blobs is not None and _lies_in(target, blobs)


def cached_blobs(folder: Path) -> Path | None:
    """Where the Hub's cache keeps the files that a snapshot in it (``models--o--n/snapshots/COMMIT``) links to."""
    folder = Path(os.path.abspath(folder))
    for place in (folder, *folder.parents):
        if place.parent.name == "snapshots" and place.parent.parent.name.startswith("models--"):
            return place.parent.parent / "blobs"
    return None


def _lies_in(target: str, folder: Path) -> bool:
    return target.startswith(os.path.join(os.path.realpath(folder), ""))


def _form(target: str) -> str:
    mode = os.stat(target).st_mode
    forms = {stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket"}
    return next((form for is_form, form in forms.items() if is_form(mode)), "a device")
