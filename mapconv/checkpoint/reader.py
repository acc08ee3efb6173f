"""Read tensors from safetensors files by byte range, into buffers that the caller reuses.

``pread`` rather than a memory map: pages of a map count as the process's own memory until the kernel takes them back,
and a positioned read is safe from several threads on one descriptor.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Lock

import torch

from mapconv.adapter import TensorRef
from mapconv.checkpoint.index import ByteSource
from mapconv.errors import CheckpointError

TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip
SAFETENSORS_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


class TensorReader:
    """Open files, each once, and positioned reads from them. Use it as a context manager.

    ``source`` is asked for the bytes of its files before each read: a checkpoint that is partly on the Hub has one.
    """

    def __init__(self, source: ByteSource | None = None) -> None:
        self._source = source
        self._descriptors: dict[Path, int] = {}
        self._lock = Lock()

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

    def read(self, ref: TensorRef) -> torch.Tensor:
        """The whole tensor, in its own dtype and shape."""
        return self.read_range(ref, 0, ref.numel, torch.empty(ref.nbytes, dtype=torch.uint8)).view(ref.shape)

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
        """Elements ``start`` to ``stop`` of the flattened tensor as a view into ``buffer``."""
        dtype = TORCH_DTYPES[ref.dtype]
        target = buffer[: (stop - start) * dtype.itemsize]
        view, offset = memoryview(target.numpy()), ref.start + start * dtype.itemsize
        if self._source is not None:
            self._source.require(ref.file, offset, offset + len(view))
        descriptor = self.descriptor(ref.file)
        while view:
            count = os.preadv(descriptor, [view], offset)
            if count == 0:
                raise CheckpointError(f"{ref.file} became shorter while it was read: tensor {ref.name} is incomplete.")
            view, offset = view[count:], offset + count
        return target.view(dtype)


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
