"""Write safetensors files: one whose layout is known beforehand, filled by several threads, and one that grows.

The layout of a merged shard is its source's, so every tensor has its place before the first byte is computed; a new
adapter's ranks may only be known once its last module is solved, so its tensors are spooled and the header comes last.
"""

from __future__ import annotations

import ctypes
import errno
import json
import math
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mapconv.adapter import ITEM_SIZES, TensorRef
from mapconv.checkpoint.flushing import begin_flush
from mapconv.checkpoint.reader import SAFETENSORS_DTYPES

#: What PEFT and transformers write into a file's header.
METADATA = {"format": "pt"}
#: One copy call moves at most this much, so that a progress bar keeps moving.
COPY_CHUNK = 64 << 20
#: A spool writes when this much has come, or this many tensors, which is as many parts as a call may have.
SPOOL_BYTES, SPOOL_TENSORS = 1 << 20, 512
#: What the kernel answers where two file systems share no way to copy between them.
_NO_KERNEL_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that a file is going to hold."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]


def lay_out(path: Path, specs: Sequence[TensorSpec], metadata: dict[str, str]) -> tuple[bytes, list[TensorRef]]:
    """The header of a file that holds ``specs`` in this order, and where each tensor will lie in it."""
    offset, entries = 0, {}
    for spec in specs:
        stop = offset + spec.nbytes
        entries[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offset, stop]}
        offset = stop
    table = {"__metadata__": metadata} | entries if metadata else entries
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the format pads the header so that data starts aligned
    start = 8 + len(text)
    placed = []
    for spec in specs:
        placed.append(TensorRef(path, spec.name, spec.dtype, spec.shape, start))
        start += spec.nbytes
    return struct.pack("<Q", len(text)) + text, placed


class FixedFile:
    """A file of known size, filled by positioned writes from any thread.

    Its room is reserved from the start, or with ``grows`` taken as it is written.
    """

    def __init__(self, path: Path, header: bytes, nbytes: int, *, grows: bool = False) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        if grows:
            os.truncate(self._descriptor, nbytes)
        else:
            reserve(self._descriptor, nbytes)
        write_at(self._descriptor, memoryview(header), 0)

    def write(self, tensor: torch.Tensor, offset: int) -> None:
        """Write a contiguous tensor's bytes at ``offset``."""
        self.write_bytes(tensor.view(-1).view(torch.uint8).numpy().data, offset)

    def write_bytes(self, data: memoryview, offset: int) -> None:
        write_at(self._descriptor, data, offset)

    def copy_from(self, descriptor: int, source: int, target: int, count: int) -> None:
        copy_range(descriptor, self._descriptor, source, target, count)

    @property
    def descriptor(self) -> int:
        return self._descriptor

    def close(self) -> None:
        os.close(self._descriptor)


class NoFile:
    """Takes what a ``FixedFile`` takes and keeps none of it: a run that only foretells what another would write."""

    def write(self, tensor: torch.Tensor, offset: int) -> None:
        pass

    def write_bytes(self, data: memoryview, offset: int) -> None:
        pass

    def copy_from(self, descriptor: int, source: int, target: int, count: int) -> None:
        pass


class SpooledFile:
    """A safetensors file whose tensors arrive one by one; ``finish`` puts the header before them.

    Memory does not grow with the file: tensors go to ``<path>.spool`` as they come. Where they are the ``expected``
    ones, room was left for just their header; otherwise the kernel moves them behind it at the end.
    """

    def __init__(self, path: Path, expected: Sequence[TensorSpec] = ()) -> None:
        self.path = path
        self._expected = list(expected)
        #: Room for it is left at the start of the file.
        self._header = lay_out(path, expected, METADATA)[0] if expected else b""
        self._waiting: list[memoryview] = []
        self._waiting_bytes = 0
        self._spool_path = path.with_name(path.name + ".spool")
        self._spool = os.open(self._spool_path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self._size = 0
        self._specs: list[TensorSpec] = []

    def append(self, name: str, tensor: torch.Tensor) -> None:
        data = tensor.detach().cpu().contiguous()
        self._specs.append(TensorSpec(name, SAFETENSORS_DTYPES[data.dtype], tuple(data.shape)))
        self._add(data)

    def append_blocks(self, spec: TensorSpec, blocks: Iterable[torch.Tensor]) -> None:
        """A tensor whose elements come block by block, each of which may be overwritten by the next."""
        self._specs.append(spec)
        for block in blocks:
            self._add(block.contiguous())
            self._flush()

    def _add(self, data: torch.Tensor) -> None:
        view = data.view(-1).view(torch.uint8).numpy().data
        self._waiting.append(view)
        self._waiting_bytes += len(view)
        if self._waiting_bytes >= SPOOL_BYTES or len(self._waiting) == SPOOL_TENSORS:
            self._flush()

    def _flush(self) -> None:
        start = len(self._header) + self._size
        write_all_at(self._spool, self._waiting, start)
        if self._expected:  # else the bytes are moved once more
            begin_flush(self._spool, start, self._waiting_bytes)
        self._size += self._waiting_bytes
        self._waiting, self._waiting_bytes = [], 0

    def finish(self) -> None:
        self._flush()
        if self._specs == self._expected:
            write_at(self._spool, memoryview(self._header), 0)
            self._spool_path.rename(self.path)
            self.close()
            return
        header, _ = lay_out(self.path, self._specs, METADATA)
        final = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            write_at(final, memoryview(header), 0)
            copy_range(self._spool, final, len(self._header), len(header), self._size)
        finally:
            os.close(final)
        self.close()

    def close(self) -> None:
        if self._spool >= 0:
            os.close(self._spool)
            self._spool_path.unlink(missing_ok=True)
            self._spool = -1


def reserve(descriptor: int, nbytes: int) -> None:
    """Give an empty file its size, and its room on the disk where the file system can set it aside.

    Writing into room that is there takes a quarter less of the processor, and a disk that is too full says so now.
    """
    os.truncate(descriptor, nbytes)
    # Not os.posix_fallocate, which writes to every page where the file system cannot do it.
    allocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if allocate is None:  # another system than Linux
        return
    size = ctypes.c_longlong
    if allocate(descriptor, 0, size(0), size(nbytes)) and ctypes.get_errno() == errno.ENOSPC:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of ``data`` at ``offset``; the kernel may take less than it was offered."""
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count


def write_all_at(descriptor: int, parts: Sequence[memoryview], offset: int) -> None:
    """Write parts one behind the other, mostly in one call."""
    count = os.pwritev(descriptor, parts, offset) if parts else 0
    for part in parts:
        # What the kernel did not take at once.
        if count < len(part):
            write_at(descriptor, part[count:], offset + count)
        count, offset = max(0, count - len(part)), offset + len(part)


def copy_range(source: int, target: int, source_offset: int, target_offset: int, count: int) -> None:
    """Copy bytes between files inside the kernel, or through memory where the file systems cannot do that."""
    while count:
        try:
            moved = os.copy_file_range(source, target, min(count, COPY_CHUNK), source_offset, target_offset)
        except (AttributeError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in _NO_KERNEL_COPY:
                raise
            data = os.pread(source, min(count, 1 << 20), source_offset)
            write_at(target, memoryview(data), target_offset)
            moved = len(data)
        if moved == 0:
            raise OSError("the source file was truncated while it was being copied")
        count, source_offset, target_offset = count - moved, source_offset + moved, target_offset + moved
