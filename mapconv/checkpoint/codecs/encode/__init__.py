"""The write side of quantized storages: a merged weight goes back into the codes that the base stores it in."""

from __future__ import annotations

from typing import Any

from mapconv.adapter import TensorRef
from mapconv.checkpoint.codecs.awq import AwqGemm
from mapconv.checkpoint.codecs.base import Bytes, Encoding
from mapconv.checkpoint.codecs.bitsandbytes import EightBit, FourBit
from mapconv.checkpoint.codecs.encode.base import CodeGrid, Store
from mapconv.checkpoint.codecs.encode.packed import AwqStore, PackedStore
from mapconv.checkpoint.codecs.encode.scaled import EightBitStore, ScaledStore
from mapconv.checkpoint.codecs.encode.small import FourBitStore, SmallFloatStore, TransposedMxfp4Store
from mapconv.checkpoint.codecs.mxfp4 import TransposedMxfp4
from mapconv.checkpoint.codecs.packed import Packed
from mapconv.checkpoint.codecs.scaled import ScaledBytes
from mapconv.checkpoint.codecs.small_floats import SmallFloats
from mapconv.checkpoint.codecs.transposed import Transposed

__all__ = ["is_writable", "open_store", "rewritten"]

_STORES: dict[type, Any] = {
    ScaledBytes: ScaledStore, EightBit: EightBitStore, Packed: PackedStore, AwqGemm: AwqStore,
    SmallFloats: SmallFloatStore, TransposedMxfp4: TransposedMxfp4Store, FourBit: FourBitStore,
}  # fmt: skip


def is_writable(encoding: Encoding) -> bool:
    """Whether a merge can write this storage: a scale and a bias for each group (MLX) it reads alone."""
    inner = encoding.inner if isinstance(encoding, Transposed) else encoding
    return type(inner) in _STORES and getattr(inner, "bias", None) is None


def rewritten(encoding: Encoding) -> tuple[TensorRef, ...]:
    """Those of a weight's stored tensors that ``Store.parts`` gives anew: its codes, scales and zero points."""
    inner = encoding.inner if isinstance(encoding, Transposed) else encoding
    if isinstance(inner, FourBit):
        found = (inner.codes, inner.absmax.values, inner.absmax.scales)
    else:
        found = (getattr(inner, name, None) for name in ("codes", "scale", "zero"))
    return tuple(ref for ref in found if ref is not None)


def open_store(encoding: Encoding, reader: Bytes, index: int = 0) -> Store:
    """Matrix ``index`` of a weight that is writable."""
    if isinstance(encoding, Transposed):
        return _Turned(open_store(encoding.inner, reader, index))
    return _STORES[type(encoding)](encoding, reader, index)


class _Turned:
    """The codes of the transpose of what another store holds."""

    def __init__(self, inner: Store) -> None:
        self._inner = inner
        self.turned = not inner.turned
        self.rescale, self.parts = inner.rescale, inner.parts

    @property
    def grid(self) -> CodeGrid:
        return self._inner.grid
