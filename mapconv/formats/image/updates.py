"""From the tensors of one module to the update that they make: factors, their rank, and their scaling."""

from __future__ import annotations

import math

from mapconv.adapter import Module, TensorRef
from mapconv.errors import AdapterError
from mapconv.formats.image.keys import KeyParts

_FLOATS = ("F32", "F16", "BF16")


def low_rank(parts: KeyParts, alpha: float | None) -> Module:
    """``s·up·down``; without an alpha s is 1."""
    down, up = required(parts, "down"), required(parts, "up")
    rank = down.shape[0] if down.shape else 0
    kernel = down.shape[2:]
    if len(down.shape) < 2 or len(up.shape) != len(down.shape) or up.shape[1:] != (rank, *(1 for _ in kernel)):
        raise unfit(down, up)
    return Module(parts.path, rank, scaling_of(alpha, rank), down, up, spelling=parts.spelling)


def required(parts: KeyParts, part: str) -> TensorRef:
    """A part that the module cannot do without.

    Raises:
        AdapterError: it is not there, or not of a floating-point dtype.
    """
    ref = parts.tensors.get(part)
    if ref is None:
        known = next(iter(parts.tensors.values()))
        raise AdapterError(f"{known.file}: {parts.path} has {known.name}, but no {part}: the file is incomplete.")
    if ref.dtype not in _FLOATS:
        raise AdapterError(f"{ref.file}: {ref.name} has dtype {ref.dtype}, expected one of {', '.join(_FLOATS)}.")
    return ref


def scaling_of(alpha: float | None, rank: int) -> float:
    return 1.0 if alpha is None else alpha / rank


def unfit(one: TensorRef, other: TensorRef) -> AdapterError:
    shapes = f"{one.name} is {list(one.shape)} and {other.name} is {list(other.shape)}"
    return AdapterError(f"{one.file}: {shapes}: no factors of one weight.")


def finite(value: float, ref: TensorRef) -> float:
    """A scalar of the file.

    Raises:
        AdapterError: NaN or infinity.
    """
    if not math.isfinite(value):
        raise AdapterError(f"{ref.file}: {ref.name} is {value}, expected a number.")
    return value
