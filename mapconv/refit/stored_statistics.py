"""Second moments of a base's layer inputs as a folder, made once for every adapter of that base.

    statistics.json           format version; base; data; per layer: its width, inputs seen, and the tensor of its root
    statistics.safetensors    the roots P (``mapconv.algebra.moments``), float32, lower triangles in strips; and of each
                              its leading directions, bfloat16, which only save every rebase from looking for them

Layers with the same input share one root.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from mapconv.adapter import TensorRef
from mapconv.algebra.fingerprint import Fingerprint
from mapconv.algebra.moments import InputRoot
from mapconv.algebra.norms import all_finite
from mapconv.algebra.regression import RegressionInputs
from mapconv.checkpoint.headers import read_tensor_file
from mapconv.checkpoint.reader import TensorReader
from mapconv.checkpoint.staging import write_file
from mapconv.checkpoint.writer import SpooledFile
from mapconv.errors import BaseMismatchError, CheckpointError
from mapconv.jsonfile import read_object
from mapconv.placement.base_check import TOLERANCE
from mapconv.untrusted.schema import COUNT, NUMBER, TABLE, TEXT, Each

STATISTICS_FILE, ROOTS_FILE = "statistics.json", "statistics.safetensors"
FORMAT_VERSION = 1
_LEADING = ".leading"
#: Rows of a root that are stored together, up to the diagonal.
STRIP = 192
#: Leading directions that are stored of a root, and the steps in which they are found: those of ranks up to 32.
LEADING, LEADING_STEPS = 40, 8
_SCHEMA = {
    "format_version": COUNT,
    "base": TABLE,
    "layers": Each({"tensor": TEXT, "width": COUNT, "tokens": COUNT, "norm": NUMBER, "projection": NUMBER}),
}


class StatisticsWriter:
    """Writes the folder as layers come; the file that makes it valid is written last."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._spool = SpooledFile(folder / ROOTS_FILE)
        self._layers: dict[str, dict[str, Any]] = {}
        self._last: tuple[int, str] = (0, "")

    def add(self, path: str, inputs: RegressionInputs, weight: Fingerprint) -> None:
        """A layer's inputs, and its weight's fingerprint; the same inputs as for the layer before are stored once."""
        if self._last[0] != id(inputs):
            self._last = id(inputs), path
            self._spool.append(path, packed(inputs.root.factor))
            count = min(LEADING, len(inputs.root.factor))
            self._spool.append(f"{path}{_LEADING}", inputs.root.leading(count, LEADING_STEPS).bfloat16())
        self._layers[path] = {
            "tensor": self._last[1],
            "width": inputs.root.factor.shape[0],
            "tokens": inputs.tokens,
            "norm": weight.norm,
            "projection": weight.projection,
        }

    def finish(self, base: Mapping[str, Any], data: Mapping[str, Any]) -> int:
        """Write the record; returns the number of layers."""
        self._spool.finish()
        record = {"format_version": FORMAT_VERSION, "base": base, "data": data, "layers": self._layers}
        write_file(self._folder / STATISTICS_FILE, json.dumps(record, indent=1) + "\n")
        return len(self._layers)

    def close(self) -> None:
        self._spool.close()


@dataclass(frozen=True)
class StoredStatistics:
    """What a folder holds; roots are read when they are asked for."""

    folder: Path
    base: Mapping[str, Any]
    data: Mapping[str, Any]
    _layers: Mapping[str, Mapping[str, Any]]
    _tensors: Mapping[str, TensorRef]

    def __contains__(self, path: str) -> bool:
        return path in self._layers

    @property
    def paths(self) -> Iterable[str]:
        return self._layers.keys()

    def shared(self, path: str) -> str:
        """The name of the root that a layer has, maybe together with others."""
        return self._layers[path]["tensor"]

    def check(self, path: str, found: Fingerprint) -> None:
        """Refuse a weight that is not the one whose inputs were collected.

        Raises:
            BaseMismatchError: it has another norm or projection.
        """
        layer = self._layers[path]
        norm, projection = layer["norm"], layer["projection"]
        if max(abs(found.norm - norm), abs(found.projection - projection)) > TOLERANCE * max(found.norm, norm):
            raise BaseMismatchError(
                f"{self.folder} was collected from another base ({self.base.get('name')}): {path} has norm "
                f"{found.norm:.9g} in --base and {norm:.9g} there, or other values; collect it from this one."
            )

    def inputs_of(
        self, paths: Iterable[str | None], reader: TensorReader
    ) -> Iterator[Callable[[], RegressionInputs] | None]:
        """What reads the inputs of layers in turn, None for unknown ones; safe to call from several threads.

        A root that neighbours share is read once, by the first call, and lives as long as what one of them was given.
        """
        known, read = "", None
        for path in paths:
            if path is None or path not in self:
                yield None
                continue
            if self.shared(path) != known:
                known, read = self.shared(path), _once(partial(self.inputs, path, reader))
            yield read

    def inputs(self, path: str, reader: TensorReader) -> RegressionInputs:
        """What is known of a layer's inputs, which are taken to be the same on every base."""
        layer = self._layers[path]
        factor, finite = _read_packed(self._tensors[layer["tensor"]], layer["width"], reader)
        root, leading = InputRoot(factor), self._tensors.get(layer["tensor"] + _LEADING)
        if leading is not None:
            columns = reader.read(leading).float()
            root, finite = root.with_leading(columns), finite and all_finite(columns)
        if not finite or not (factor.diagonal() > 0).all():
            raise CheckpointError(
                f"{self.folder / ROOTS_FILE}: {layer['tensor']} is not the root of a second moment: make the folder "
                "again with `mapconv statistics`."
            )
        return RegressionInputs(root, None, layer["tokens"])


def read_statistics(folder: Path) -> StoredStatistics:
    """What ``mapconv statistics`` wrote.

    Raises:
        CheckpointError: not such a folder, or files that do not belong together.
    """
    path = folder / STATISTICS_FILE
    try:
        record = read_object(path, CheckpointError, schema=_SCHEMA)
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {STATISTICS_FILE}: make it with `mapconv statistics`.") from None
    if record["format_version"] != FORMAT_VERSION:
        raise CheckpointError(f"{path} has format version {record['format_version']}, expected {FORMAT_VERSION}.")
    tensors = {ref.name: ref for ref in read_tensor_file(folder / ROOTS_FILE).tensors}
    for layer, entry in record["layers"].items():
        ref, leading = tensors.get(entry["tensor"]), tensors.get(entry["tensor"] + _LEADING)
        fits = ref is not None and ref.dtype == "F32" and ref.shape == (packed_size(entry["width"]),)
        # Folders without leading directions are older.
        if leading is not None:
            fits = fits and leading.dtype == "BF16" and len(leading.shape) == 2 and leading.shape[0] == entry["width"]
        if not fits:
            raise CheckpointError(
                f"{folder / ROOTS_FILE} has no root of width {entry['width']} for {layer}: the two files do not belong "
                "together, so make the folder again."
            )
    return StoredStatistics(folder, record["base"], record.get("data") or {}, record["layers"], tensors)


def packed(factor: torch.Tensor) -> torch.Tensor:
    """A lower triangular matrix (m, m) as a flat tensor: strips of rows, each up to its last row's diagonal."""
    return torch.cat([factor[start:stop, :stop].flatten() for start, stop in _strips(len(factor))])


def _read_packed(ref: TensorRef, width: int, reader: TensorReader) -> tuple[torch.Tensor, bool]:
    """The matrix that ``packed`` made a stored tensor of, and whether its values are finite.

    What is above the strips is never touched, so that it takes no memory.
    """
    factor, position, finite = torch.zeros(width, width), 0, True
    buffer = torch.empty(4 * min(STRIP, width) * width, dtype=torch.uint8)
    for start, stop in _strips(width):
        size = (stop - start) * stop
        strip = reader.read_range(ref, position, position + size, buffer).view(stop - start, stop)
        finite = finite and all_finite(strip)
        factor[start:stop, :stop] = strip
        position += size
    return factor, finite


def packed_size(width: int) -> int:
    """Elements of a packed matrix."""
    return sum((stop - start) * stop for start, stop in _strips(width))


def _once(read: Callable[[], RegressionInputs]) -> Callable[[], RegressionInputs]:
    """``read`` for several threads, of which the first calls it and the others wait."""
    lock, kept = Lock(), cache(read)

    def inputs() -> RegressionInputs:
        with lock:
            return kept()

    return inputs


def _strips(width: int) -> list[tuple[int, int]]:
    return [(start, min(start + STRIP, width)) for start in range(0, width, STRIP)]
