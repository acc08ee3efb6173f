"""Notice that a file changes while it is read: what is made of it would be of neither the old content nor the new."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mapconv.errors import CheckpointError


@dataclass(frozen=True)
class FileSignature:
    """What a file system says of a file's content. The time of change tells what keeps size and modification time."""

    device: int
    inode: int
    size: int
    modified: int
    changed: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileSignature:
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def signatures_of(sources: Iterable[Path], names: Iterable[str]) -> dict[Path, FileSignature]:
    """The signatures of those of these files that are there, in folders or as they are given; links are followed."""
    paths = [path for source in sources for path in (source, *(source / name for name in names)) if not path.is_dir()]
    return {path: FileSignature.of(path.stat()) for path in paths if os.path.exists(path)}


@contextmanager
def unchanged(signatures: Mapping[Path, FileSignature]) -> Iterator[None]:
    """Hold these files to their signatures at the end of the block, also where it failed: a change may be the reason.

    Raises:
        CheckpointError: one of them has changed or is gone.
    """
    try:
        yield
    except Exception:
        _check(signatures)
        raise
    _check(signatures)


def _check(signatures: Mapping[Path, FileSignature]) -> None:
    for path, signature in signatures.items():
        try:
            same = FileSignature.of(os.stat(path)) == signature
        except OSError:
            same = False
        if not same:
            raise CheckpointError(
                f"{path} changed while it was being read, so nothing was written: run the command again when it is "
                "complete."
            ) from None
