"""Outputs that appear whole or not at all: write into a hidden sibling folder, then rename it into place."""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mapconv.errors import DiskFullError, OutputError

#: A folder that holds one of these is a model or an adapter, which --force may replace; any other is left alone.
_OUR_MARKS = ("map_config.json", "adapter_config.json", "config.json")


def check_output(out: Path, *, force: bool, inputs: Iterable[Path], nbytes: int = 0) -> None:
    """Refuse an output path that is taken, is or holds one of the inputs, or has no room.

    Raises:
        OutputError: with the sentence that says which, before anything was computed.
    """
    resolved = out.resolve()
    for path in inputs:
        other = path.resolve()
        if resolved == other or resolved in other.parents:
            raise OutputError(f"{out} is, or holds, the input {path}: choose another output folder.")
    if os.path.lexists(out):
        if not force:
            raise OutputError(f"{out} exists already: pass --force to replace it, or choose another output folder.")
        if not out.is_dir() or out.is_symlink():
            raise OutputError(f"{out} is not a folder, so --force will not replace it: choose another output folder.")
        if any(out.iterdir()) and not any((out / mark).exists() for mark in _OUR_MARKS):
            raise OutputError(f"{out} holds neither a model nor an adapter, so --force will not replace it.")
    parent = _existing_parent(resolved)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"no permission to write in {parent}: choose another output folder.")
    free = shutil.disk_usage(parent).free
    if nbytes > free:
        raise DiskFullError(f"{out} needs {nbytes:,} bytes but only {free:,} are free in {parent}: make room first.")


def check_output_file(out: Path, *, force: bool, suffix: str) -> None:
    """Refuse a file to write that is taken, is a folder, or whose name says that it is something else.

    Only the suffix keeps ``--force`` from the files of a model or an adapter, so it is held to.

    Raises:
        OutputError: with the sentence that says which, before anything was computed.
    """
    if out.suffix.lower() != suffix:
        raise OutputError(f"{out} does not end with {suffix}: give the file that name.")
    if os.path.lexists(out):
        if not out.is_file() or out.is_symlink():
            raise OutputError(f"{out} is not a file, so it will not be replaced: choose another output file.")
        if not force:
            raise OutputError(f"{out} exists already: pass --force to replace it, or choose another output file.")
    parent = _existing_parent(out.resolve())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{parent} is no folder that can be written in: choose another output file.")


def replace_file(out: Path, content: bytes) -> None:
    """Write a file of any size that is whole or as it was: into a hidden sibling, to the disk, then by its name."""
    out.parent.mkdir(parents=True, exist_ok=True)
    for leftover in out.parent.glob(f".{glob.escape(out.name)}.partial-*"):
        leftover.unlink(missing_ok=True)
    temporary = out.parent / f".{out.name}.partial-{uuid.uuid4().hex[:8]}"
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def staged_folder(out: Path, *, force: bool) -> Iterator[Path]:
    """Yield an empty folder beside ``out`` that becomes ``out`` when the block ends well, and vanishes otherwise.

    A killed run leaves its staging folder behind; the next run to the same ``out`` removes it. A lock on the folder,
    which dies with its process, tells a dead run's folder from one that is still being written.
    """
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(out)
    staging = out.parent / f".{out.name}.partial-{uuid.uuid4().hex[:8]}"
    staging.mkdir()
    lock = os.open(staging, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield staging
        _rename_into_place(staging, out, force=force)
    finally:
        os.close(lock)
        shutil.rmtree(staging, ignore_errors=True)


def write_file(path: Path, text: str) -> None:
    """Write a small text file and push it to the disk."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _rename_into_place(staging: Path, out: Path, *, force: bool) -> None:
    replaced = None
    if force and out.exists():
        replaced = out.parent / f".{out.name}.partial-{uuid.uuid4().hex[:8]}"
        out.rename(replaced)
    try:
        staging.rename(out)
    except OSError:
        if replaced is not None:
            replaced.rename(out)
        elif out.exists():
            raise OutputError(f"{out} appeared while it was being made: pass --force to replace it.") from None
        raise
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)


def _remove_leftovers(out: Path) -> None:
    for leftover in out.parent.iterdir():
        if not leftover.name.startswith(f".{out.name}.partial-"):
            continue
        try:
            descriptor = os.open(leftover, os.O_RDONLY)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue  # a live run is writing it
        else:
            shutil.rmtree(leftover, ignore_errors=True)
        finally:
            os.close(descriptor)


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in path.parents if parent.exists())
