"""Read tensors from safetensors files by byte range, into buffers that the caller reuses.

``pread`` rather than a memory map: pages of a map count as the process's own memory until the kernel takes them back,
and a positioned read is safe from several threads on one descriptor.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Lock, local
from typing import TypeVar

import torch

from mapconv.adapter import TensorRef
from mapconv.algebra.norms import BLOCK_ELEMENTS, row_blocks
from mapconv.checkpoint.codecs.base import EncodedTensor
from mapconv.checkpoint.index import ByteSource
from mapconv.errors import CheckpointError

T = TypeVar("T")

TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip
SAFETENSORS_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def row_ranges(ref: TensorRef) -> Iterator[tuple[int, int]]:
    """Element ranges (start, stop) of about a block each that cover a tensor and cut none of its rows."""
    width = max(1, ref.shape[-1]) if ref.shape else 1
    for start, stop in row_blocks(ref.numel // width, width):
        yield start * width, stop * width


def block_elements(ref: TensorRef) -> int:
    """The most elements that one of those ranges has."""
    return max(BLOCK_ELEMENTS, ref.shape[-1] if ref.shape else 1)


class TensorReader:
    """Open files, each once, and positioned reads from them. Use it as a context manager.

    ``source`` is asked for the bytes of its files before each read: a checkpoint that is partly on the Hub has one.
    """

    def __init__(self, source: ByteSource | None = None) -> None:
        self._source = source
        self._descriptors: dict[Path, int] = {}
        self._lock = Lock()
        self._local = local()

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *exception: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def descriptor(self, file: Path) -> int:
        with self._lock:
            if file not in self._descriptors:
                self._descriptors[file] = os.open(file, os.O_RDONLY)
            return self._descriptors[file]

    def opened(self, file: Path, start: int, stop: int) -> int:
        """The descriptor of a file whose bytes [start, stop) are on the disk."""
        if self._source is not None:
            self._source.require(file, start, stop)
        return self.descriptor(file)

    def read(self, ref: TensorRef) -> torch.Tensor:
        """The whole tensor, in its own dtype and shape; one that is stored in codes, in float32."""
        return self.read_range(ref, 0, ref.numel, torch.empty(_buffer_bytes(ref), dtype=torch.uint8)).view(ref.shape)

    def blocks(self, ref: TensorRef) -> Iterator[torch.Tensor]:
        """All elements in turn, flat, a block at a time that shares memory with the next one."""
        buffer = torch.empty(8 * block_elements(ref), dtype=torch.uint8)
        for start, stop in row_ranges(ref):
            yield self.read_range(ref, start, stop, buffer)

    @staticmethod
    def dtype_of(ref: TensorRef) -> str:
        """The dtype, by the format's name, that its values are read in."""
        return "F32" if isinstance(ref, EncodedTensor) else ref.dtype

    def read_runs(self, refs: Sequence[TensorRef]) -> Iterator[tuple[list[TensorRef], torch.Tensor]]:
        """All elements of whole tensors, flat: those that follow one another in a file, of one dtype, in one read."""
        for run in _runs(refs):
            buffer = torch.empty(run[-1].stop - run[0].start, dtype=torch.uint8)
            yield run, self.read_range(run[0], 0, len(buffer) // TORCH_DTYPES[run[0].dtype].itemsize, buffer)

    def read_rows(self, ref: TensorRef, start: int, stop: int, buffer: torch.Tensor) -> torch.Tensor:
        """Rows ``start`` to ``stop`` (first dimension) as a view into ``buffer``, a flat uint8 tensor."""
        width = ref.numel // ref.shape[0]
        return self.read_range(ref, start * width, stop * width, buffer).view(stop - start, *ref.shape[1:])

    def read_range(self, ref: TensorRef, start: int, stop: int, buffer: torch.Tensor) -> torch.Tensor:
        """Elements ``start`` to ``stop`` of the flattened tensor as a view into ``buffer``.

        Of a tensor that is stored in codes they must be whole rows (of the last dimension), and come in float32.
        """
        if isinstance(ref, EncodedTensor):
            width = ref.shape[-1]
            rows = buffer[: 4 * (stop - start)].view(torch.float32).view(-1, width)
            ref.encoding.rows(self, start // width, stop // width, rows)
            return rows.view(-1)
        dtype = TORCH_DTYPES[ref.dtype]
        target = buffer[: (stop - start) * dtype.itemsize]
        self._read_into(target, ref, start * dtype.itemsize)
        return target.view(dtype)

    def read_block(self, ref: TensorRef, start: int, rows: torch.Tensor, memory: memoryview) -> None:
        """Fill ``rows`` (p, m), a part of ``memory`` in the dtype of ``dtype_of``, with its rows from ``start`` on.

        ``read_range`` for a caller that has the same views for many blocks.
        """
        if isinstance(ref, EncodedTensor):
            decoded = rows.view(-1, ref.shape[-1])
            first = start * rows.shape[1] // ref.shape[-1]
            ref.encoding.rows(self, first, first + len(decoded), decoded)
        else:
            self._fill(memory, ref, start * rows.shape[1] * rows.itemsize)

    def read_bytes(self, ref: TensorRef, start: int, stop: int) -> torch.Tensor:
        """Bytes ``start`` to ``stop`` of a stored tensor, (stop − start,) uint8."""
        target = torch.empty(stop - start, dtype=torch.uint8)
        self._read_into(target, ref, start)
        return target

    def kept(self, owner: object, name: str, make: Callable[[], T]) -> T:
        """What ``make`` gives, made anew only where this thread has since read another weight than ``owner``."""
        if getattr(self._local, "owner", None) != owner:
            self._local.owner, self._local.parts = owner, {}
        parts: dict[str, T] = self._local.parts
        if name not in parts:
            parts[name] = make()
            # It may be made of a weight for which something was kept meanwhile.
            self._local.owner, self._local.parts = owner, parts
        return parts[name]

    def _read_into(self, target: torch.Tensor, ref: TensorRef, start: int) -> None:
        self._fill(target.numpy().data, ref, start)

    def _fill(self, view: memoryview, ref: TensorRef, start: int) -> None:
        """Fill ``view`` with the tensor's bytes from ``start`` on."""
        offset = ref.start + start
        descriptor = self.opened(ref.file, offset, offset + len(view))
        while view:
            count = os.preadv(descriptor, [view], offset)
            if count == 0:
                raise CheckpointError(f"{ref.file} was truncated during reading: tensor {ref.name} is incomplete.")
            view, offset = view[count:], offset + count


def _runs(refs: Sequence[TensorRef]) -> list[list[TensorRef]]:
    """The tensors in their order, those together that follow one another in one file."""
    runs: list[list[TensorRef]] = []
    stop = 0
    for ref in refs:
        last = runs[-1][-1] if runs else None
        if last is not None and ref.start == stop and ref.dtype == last.dtype and ref.file == last.file:
            runs[-1].append(ref)
        else:
            runs.append([ref])
        stop = ref.stop
    return runs


def _buffer_bytes(ref: TensorRef) -> int:
    return 4 * ref.numel if isinstance(ref, EncodedTensor) else ref.nbytes
