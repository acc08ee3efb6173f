"""Adapters saved as pickles (``adapter_model.bin`` …): opened with torch's weights-only loader, and only when allowed.

The tensors are rewritten into a temporary safetensors file of this process, so that everything after reads them like
any other adapter: by byte range, one at a time.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
import zipfile
from functools import cache
from pathlib import Path

from mapconv.adapter import TensorRef
from mapconv.checkpoint.headers import TensorFile, read_tensor_file
from mapconv.checkpoint.unchanged import FileSignature
from mapconv.errors import AdapterError, UnsupportedError
from mapconv.files import open_regular
from mapconv.formats.base import WEIGHTS_FILE
from mapconv.jsonfile import LFS_POINTER

PICKLE_FILE = "adapter_model.bin"
#: Tensors may share memory, which a safetensors file holds once for each.
_MOST_GROWTH = 16


def refuse_pointer(path: Path) -> None:
    """Say that a file is a Git LFS pointer, which is neither a pickle nor anything else to be opened.

    Raises:
        AdapterError: it is one, or no regular file of its folder.
    """
    with open_regular(path, AdapterError) as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise AdapterError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` in its folder.")


def read_pickle(path: Path, *, allow_pickle: bool, inside: str | None = None) -> tuple[TensorRef, ...]:
    """The tensors of a pickled state dict, at least one; ``inside`` is the key that a program keeps it under.

    Raises:
        AdapterError: a file that the weights-only loader refuses, or that holds anything but tensors, or none.
        UnsupportedError: pickles are not allowed.
    """
    refuse_pointer(path)
    if not allow_pickle:
        raise UnsupportedError(
            f"{path} is a pickle, which can run code when it is opened: convert it to {WEIGHTS_FILE}, or pass "
            "--allow-pickle to read it with torch's weights-only loader."
        )
    return some_tensors(read_tensor_file(_as_safetensors(path, inside, FileSignature.of(path.stat()))))


def some_tensors(file: TensorFile) -> tuple[TensorRef, ...]:
    """The tensors of an adapter's weights.

    Raises:
        AdapterError: there are none.
    """
    if not file.tensors:
        raise AdapterError(f"{file.path} holds no tensors: it was saved empty, and there is nothing to convert.")
    return file.tensors


@cache
def _as_safetensors(path: Path, inside: str | None, signature: FileSignature) -> Path:
    """A safetensors copy of a pickled state dict in this state; it goes when the process ends."""
    import torch
    from safetensors.torch import save_file

    _refuse_bomb(path)
    try:
        table = torch.load(path, map_location="cpu", weights_only=True, mmap=None)
    except Exception as error:  # the unpickler raises whatever a broken or hostile file makes it raise
        raise AdapterError(f"{path} is refused by torch's weights-only loader ({type(error).__name__}).") from error
    if inside is not None and isinstance(table, dict):
        table = table.get(inside)
    if not isinstance(table, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in table.items()
    ):
        raise AdapterError(f"{path} holds something other than a table of tensors: it is not an adapter's weights.")
    size, claimed = path.stat().st_size, sum(value.nbytes for value in table.values())
    if claimed > _MOST_GROWTH * size:
        raise AdapterError(
            f"{path} is {size:,} bytes long but its tensors have {claimed:,}: they repeat the same few numbers, "
            "so it is not an adapter's weights."
        )
    folder = Path(tempfile.mkdtemp(prefix="mapconv-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    target = folder / WEIGHTS_FILE
    # clone: tensors of a pickle may share memory, which safetensors refuses to write
    save_file({key: value.clone().contiguous() for key, value in table.items()}, target)
    return target


def _refuse_bomb(path: Path) -> None:
    """torch stores its tensors uncompressed in a zip file; one whose parts expand would fill the memory."""
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            expanded = sum(part.file_size for part in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return  # the older form, or none at all, which torch's loader says
    if expanded > _MOST_GROWTH * size:
        raise AdapterError(
            f"{path} is {size:,} bytes long and expands to {expanded:,}: torch does not compress, so it is not an "
            "adapter's weights."
        )
