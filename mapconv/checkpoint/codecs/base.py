"""What a quantized weight is to the rest of mapconv: a tensor of its plain shape whose values are decoded when read.

A ``Codec`` recognises one storage in a checkpoint and yields an ``EncodedTensor`` for each weight in it. That is a
``TensorRef`` like any other (plain name, plain shape, and the dtype that the weight has once it is written plain), so
that placing, merging and measuring need not know of it; ``TensorReader`` hands out its float32 values by rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from mapconv.adapter import TensorRef
from mapconv.errors import CheckpointError

T = TypeVar("T")


class Bytes(Protocol):
    """What decoding asks of a reader (``mapconv.checkpoint.reader.TensorReader``)."""

    def read(self, ref: TensorRef) -> torch.Tensor:
        """A whole tensor of a dtype that torch can name on every version."""
        ...

    def read_bytes(self, ref: TensorRef, start: int, stop: int) -> torch.Tensor:
        """Bytes ``start`` to ``stop`` of a tensor's data, (stop − start,) uint8."""
        ...

    def kept(self, owner: object, name: str, make: Callable[[], T]) -> T:
        """What ``make`` gives, made once by each thread while the weight that it reads is ``owner``."""
        ...


class Encoding(Protocol):
    """How the stored tensors of one weight stand for its values.

    Encodings are frozen records of names, byte ranges and numbers, so that a job that holds one runs anywhere.
    """

    @property
    def label(self) -> str:
        """The storage's name as users know it: ``bitsandbytes nf4``."""
        ...

    @property
    def stored(self) -> tuple[TensorRef, ...]:
        """The tensors that the values are made of, the codes first; they may lie in different files."""
        ...

    def rows(self, reader: Bytes, start: int, stop: int, out: torch.Tensor) -> None:
        """Decode rows ``start`` to ``stop`` into ``out`` (rows, width), float32; all leading dimensions count rows.

        Raises:
            CheckpointError: scales or codes that no weight can have.
        """


@dataclass(frozen=True)
class EncodedTensor(TensorRef):
    """A weight that is stored in codes, at the place of its codes; ``dtype`` is what it is written as when plain."""

    encoding: Encoding

    @property
    def stored(self) -> tuple[TensorRef, ...]:
        return self.encoding.stored


@dataclass
class QuantizedModel:
    """A checkpoint while its codec looks through it: ``take`` hands out tensors, and what nobody took is left over.

    ``settings`` is the model's quantization configuration, ``config`` the rest of it.
    """

    folder: Path
    tensors: Mapping[str, TensorRef]
    settings: Mapping[str, Any]
    config: Mapping[str, Any]
    dtype: str
    reader: Bytes
    taken: set[str] = field(default_factory=set)

    def ending(self, *suffixes: str) -> list[tuple[str, TensorRef]]:
        """(module path, tensor) of each tensor whose name is the path and one of these suffixes."""
        return [
            (name.removesuffix(suffix), ref)
            for name, ref in self.tensors.items()
            for suffix in suffixes
            if name.endswith(suffix) and name not in self.taken
        ]

    def find(self, name: str) -> TensorRef | None:
        """A companion that may be absent; it counts as taken."""
        ref = self.tensors.get(name)
        if ref is not None:
            self.taken.add(name)
        return ref

    def take(self, name: str, *shapes: tuple[int, ...], owner: TensorRef) -> TensorRef:
        """A companion that ``owner`` cannot do without, in one of these shapes (none given: any)."""
        ref = self.find(name)
        if ref is None:
            raise fault(owner, f"is stored in codes, but {name} is missing: download the model again")
        if shapes and ref.shape not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
            raise fault(ref, f"is {list(ref.shape)}, expected {wanted} for {owner.name} {list(owner.shape)}")
        return ref

    def encoded(self, name: str, shape: Sequence[int], encoding: Encoding, dtype: str | None = None) -> EncodedTensor:
        """The weight that an encoding makes; all that it is stored in counts as taken."""
        self.taken.update(ref.name for ref in encoding.stored)
        codes = encoding.stored[0]
        return EncodedTensor(codes.file, name, dtype or self.dtype, tuple(shape), codes.start, encoding)


class Codec(Protocol):
    """One storage: where it is in a checkpoint."""

    @property
    def methods(self) -> tuple[str, ...]:
        """The values of ``quant_method`` that name it."""
        ...

    @property
    def signature(self) -> tuple[str, ...]:
        """Endings of tensors' names that tell it from all others, where the configuration does not."""
        ...

    @property
    def companions(self) -> tuple[str, ...]:
        """Endings of the names of its tensors that no plain weight has."""
        ...

    def describing(self, tensors: Mapping[str, TensorRef]) -> list[TensorRef]:
        """Small tensors whose values say what shape a weight has; they are read before anything is placed."""
        ...

    def weights(self, model: QuantizedModel) -> Iterator[EncodedTensor]:
        """Every weight in this storage.

        Raises:
            CheckpointError: companions that are missing or do not fit. UnsupportedError: a version not known.
        """
        ...


def fault(ref: TensorRef, what: str) -> CheckpointError:
    """The error for a tensor that is not what its storage asks for."""
    return CheckpointError(f"{ref.file}: {ref.name} {what}.")
