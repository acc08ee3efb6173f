"""Outputs that appear whole or not at all: write into a hidden sibling folder, flush it, then rename it into place."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import BinaryIO

from mapconv.checkpoint.exchange import hidden_sibling, put_in_place, take_back, token
from mapconv.checkpoint.filenames import AWAITING
from mapconv.checkpoint.flushing import begin_flush
from mapconv.checkpoint.replaceable import check_replaceable
from mapconv.errors import DiskFullError, OutputError

#: What the files of models and adapters end with.
_FILES = (".safetensors", ".gguf", ".bin", ".ckpt", ".pt")


def check_output(
    out: Path, *, force: bool, inputs: Iterable[Path], nbytes: int = 0, carries_over: bool = False
) -> None:
    """Refuse a folder to write that is taken, is or holds an input, has no room, or is named as a file.

    ``carries_over``: the new folder will have all that lies in the old one, so that any folder may be replaced.

    Raises:
        OutputError: with the sentence that says which, before anything was computed.
    """
    resolved = out.resolve()
    if not os.path.lexists(resolved):
        _tidy(resolved, remove=False)
    for path in inputs:
        other = path.resolve()
        if resolved == other or resolved in other.parents:
            raise OutputError(f"{out} is, or holds, the input {path}: choose another output folder.")
    if os.path.lexists(out):
        if not force:
            raise OutputError(f"{out} exists already: pass --force to replace it, or choose another output folder.")
        if not out.is_dir() or out.is_symlink():
            raise OutputError(f"{out} is not a folder, so --force will not replace it: choose another output folder.")
        if not carries_over:
            check_replaceable(out)
    elif out.suffix.lower() in _FILES:
        raise OutputError(f"the result is a folder, and {out} is a file's name: choose another.")
    parent = _existing_parent(resolved)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"no permission to write in {parent}: choose another output folder.")
    _require_room(out, parent, nbytes)


def check_output_file(out: Path, *, force: bool, suffix: str, inputs: Iterable[Path] = (), nbytes: int = 0) -> None:
    """Refuse a file to write that is taken, is a folder or an input, has no room, or is named as something else.

    Only the suffix keeps ``--force`` from the files of a model or an adapter, so it is held to.

    Raises:
        OutputError: with the sentence that says which, before anything was computed.
    """
    if out.suffix.lower() != suffix:
        raise OutputError(f"{out} does not end with {suffix}: give the file that name.")
    for path in inputs:
        if out.resolve() == path.resolve():
            raise OutputError(f"{out} is the input {path}: choose another output file.")
    if os.path.lexists(out):
        if not out.is_file() or out.is_symlink():
            raise OutputError(f"{out} is not a file, so it will not be replaced: choose another output file.")
        if not force:
            raise OutputError(f"{out} exists already: pass --force to replace it, or choose another output file.")
    parent = _existing_parent(out.resolve())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{parent} is not a writable folder: choose another output file.")
    _require_room(out, parent, nbytes)


@contextmanager
def replaced_file(out: Path) -> Iterator[BinaryIO]:
    """Yield a file to write that takes the name ``out`` when the block ends well, and vanishes otherwise.

    What has that name is whole at any moment: the old file, or the new one, on the disk. What a killed run leaves is
    removed by the next one, as ``staged_folder`` does it.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(out)
    temporary = hidden_sibling(out, f".partial-{token()}")
    try:
        # Exclusively: a link that somebody planted under this name is not followed.
        with open(temporary, "xb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)


def replace_file(out: Path, content: bytes) -> None:
    """Write all of a file, as ``replaced_file`` does."""
    with replaced_file(out) as file:
        file.write(content)


def remove_file(path: Path) -> None:
    """Remove what ``replaced_file`` wrote, and what killed runs left of it; nothing there is no fault."""
    path.unlink(missing_ok=True)
    _remove_leftovers(path)


def _require_room(out: Path, parent: Path, nbytes: int) -> None:
    free = shutil.disk_usage(parent).free
    if nbytes > free:
        raise DiskFullError(f"{out} needs {nbytes:,} bytes but only {free:,} are free in {parent}: free some space.")


@contextmanager
def staged_file(out: Path, name: str) -> Iterator[Path]:
    """Yield an empty folder whose file ``name`` becomes ``out`` when the block ends well, in one step."""
    with _staging(out.resolve()) as staging:
        yield staging
        _flush(staging)
        (staging / name).replace(out)


@contextmanager
def staged_files(out: Path, last: Sequence[str]) -> Iterator[Path]:
    """Yield an empty folder whose files go into the folder ``out``, among what lies there, when the block ends well.

    The files of the names ``last``, which make the others valid, go away first and come last, in this order.
    """
    out = out.resolve()
    with _staging(out) as staging:
        yield staging
        _flush(staging)
        out.mkdir(exist_ok=True)
        for name in reversed(last):
            (out / name).unlink(missing_ok=True)
        for path in sorted(staging.iterdir(), key=lambda path: path.name in last and last.index(path.name) + 1):
            path.replace(out / path.name)


@contextmanager
def staged_folder(out: Path, *, force: bool) -> Iterator[Path]:
    """Yield an empty folder beside ``out`` that becomes ``out`` when the block ends well, and vanishes otherwise.

    A killed run leaves its staging folder behind; the next run to the same ``out`` removes it. A lock on the folder,
    which dies with its process, tells a dead run's folder from one that is still being written.
    """
    out = out.resolve()
    with _staging(out) as staging:
        yield staging
        _flush(staging)
        put_in_place(staging, out, force=force)


def awaits(folder: Path, other_out: Path) -> bool:
    """Whether a killed run left ``folder`` in its place before ``other_out``, which never came (``staged_with``)."""
    try:
        written = (folder / AWAITING).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    return written == str(other_out.resolve()) and not os.path.lexists(other_out)


@contextmanager
def staged_with(
    folder: Path, other: AbstractContextManager[Path], other_out: Path, *, force: bool
) -> Iterator[tuple[Path, Path]]:
    """Yield what ``staged_folder`` does for ``folder``, and what ``other``, a staging of ``other_out``, does: both
    appear, or none.

    No system renames two paths in one step. What fails after the first of them is in its place takes it back. A kill
    between the two leaves the folder with a note in it of what it awaits, and the next run of the pair replaces it.
    """
    folder = folder.resolve()
    force = force or awaits(folder, other_out)
    with _staging(folder) as staging:
        own = os.stat(staging)
        try:
            with other as second:
                yield staging, second
                write_file(staging / AWAITING, str(other_out.resolve()))
                # Now, so that all that is left to be done after the first renaming is the second one.
                _flush(second if second.is_dir() else second.parent)
                _flush(staging)
                put_in_place(staging, folder, force=force)
        except BaseException:
            if os.path.lexists(folder) and os.path.samestat(os.stat(folder), own):
                take_back(staging, folder)
            raise
        (folder / AWAITING).unlink()


@contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A hidden folder beside ``out``, locked while this process writes it and gone afterwards."""
    out.parent.mkdir(parents=True, exist_ok=True)
    _tidy(out, remove=True)
    staging = hidden_sibling(out, f".partial-{token()}")
    staging.mkdir()
    lock = os.open(staging, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield staging
    finally:
        os.close(lock)
        shutil.rmtree(staging, ignore_errors=True)


def write_file(path: Path, text: str) -> None:
    """Write a small text file into a staged folder, which goes to the disk as a whole."""
    path.write_text(text, encoding="utf-8")


def _tidy(out: Path, *, remove: bool) -> None:
    """Give an old result its name back if a run was killed while it had stepped aside; remove what dead runs left."""
    for aside in _siblings(out, ".replaced-"):
        if not os.path.lexists(out):
            aside.rename(out)
        elif remove:
            shutil.rmtree(aside, ignore_errors=True)
    if remove:
        _remove_leftovers(out)


def _flush(folder: Path) -> None:
    """Push all files to the disk, so that no power cut leaves a name without its content."""
    paths = [os.path.join(root, name) for root, _, files in os.walk(folder) for name in files]
    # All have their places on the disk before the first is waited for: a journal then commits them together.
    for push in (begin_flush, os.fsync):
        for path in paths:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                push(descriptor)
            finally:
                os.close(descriptor)


def _remove_leftovers(out: Path) -> None:
    for leftover in _siblings(out, ".partial-"):
        try:
            descriptor = os.open(leftover, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue  # a live run is writing it
        else:
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)
        finally:
            os.close(descriptor)


def _siblings(out: Path, ending: str) -> list[Path]:
    prefix = hidden_sibling(out, ending).name
    try:
        # Names alone: a catalog's folder holds thousands.
        return [out.parent / name for name in os.listdir(out.parent) if name.startswith(prefix)]
    except OSError:
        return []


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in path.parents if parent.exists())
