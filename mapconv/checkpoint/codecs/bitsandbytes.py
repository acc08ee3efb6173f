"""bitsandbytes: 4-bit codes of a 16-entry code book by blocks of the flattened weight, and int8 by rows.

4 bits: ``w = book[code] · absmax[i // block]``, the first of two codes in the high nibble. With double quantization
absmax is itself stored in codes of a byte: ``nested_book[code] · nested_absmax[j // nested_block] + offset``.
8 bits: ``w = code · SCB / 127``. (bitsandbytes, functional.QuantState and nn.Linear8bitLt)
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from mapconv.adapter import TensorRef
from mapconv.checkpoint.codecs.arithmetic import (
    expand_nibbles,
    kept_scales,
    nibble_table,
    read_floats,
    require_scales,
    scale_,
)
from mapconv.checkpoint.codecs.base import Bytes, EncodedTensor, Encoding, QuantizedModel, fault
from mapconv.checkpoint.codecs.transposed import Transposed
from mapconv.errors import UnsupportedError

_STATES = (".weight.quant_state.bitsandbytes__nf4", ".weight.quant_state.bitsandbytes__fp4")
_STATE_BYTES = 1 << 16
#: The product with 1/127 as the library forms it.
_PER_CODE = 7.874015718698502e-3
_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
#: transformers' model types whose Conv1D stores a plain weight as (in, out), while the library's codes are (out, in).
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")


@dataclass(frozen=True)
class Absmax:
    """The scales of the blocks: floats, or codes of a byte with scales of their own (double quantization)."""

    values: TensorRef
    book: TensorRef | None = None
    scales: TensorRef | None = None
    block: int = 256
    offset: float = 0.0

    @property
    def stored(self) -> tuple[TensorRef, ...]:
        return tuple(ref for ref in (self.values, self.book, self.scales) if ref is not None)

    def read(self, reader: Bytes, start: int, stop: int) -> torch.Tensor:
        """(stop − start,) float32."""
        if self.book is None or self.scales is None:
            return read_floats(reader, self.values, start, stop)
        codes = reader.read_bytes(self.values, start, stop).int()
        values = torch.index_select(_read_book(self.book, reader), 0, codes)
        first, last = start // self.block, -(-stop // self.block)
        scales = read_floats(reader, self.scales, first, last)
        require_scales(scales, self.scales)
        return values * scales[torch.arange(start, stop) // self.block - first] + self.offset


@dataclass(frozen=True)
class FourBit:
    """One 4-bit weight of ``width`` columns and ``numel`` elements; blocks run across the ends of its rows."""

    label: str
    codes: TensorRef
    book: TensorRef
    absmax: Absmax
    state: TensorRef
    block: int
    numel: int
    width: int

    @property
    def stored(self) -> tuple[TensorRef, ...]:
        return (self.codes, self.book, *self.absmax.stored, self.state)

    def rows(self, reader: Bytes, start: int, stop: int, out: torch.Tensor) -> None:
        first, last = start * self.width, stop * self.width
        # Whole blocks, of which the weight's end may cut the last one short.
        block_start, block_stop = first // self.block, -(-last // self.block)
        low, high = block_start * self.block, min(block_stop * self.block, self.numel)
        fits = (low, high) == (first, last) and (high - low) % 2 == 0
        values = out.view(-1) if fits else torch.empty(high - low + (high - low) % 2)
        codes = reader.read_bytes(self.codes, low // 2, (high + 1) // 2)
        expand_nibbles(codes, reader.kept(self.codes, "table", lambda: self._table(reader)), values)
        blocks, origin = -(-self.numel // self.block), self.absmax.values
        read = partial(self.absmax.read, reader)
        scales, sound = kept_scales(reader, self.codes, origin, (blocks, 1), (block_start, block_stop), read)
        scale_(values[None, : high - low], scales[None], self.block, origin, sound=sound)
        if not fits:
            out.view(-1).copy_(values[first - low : last - low])

    def _table(self, reader: Bytes) -> torch.Tensor:
        return nibble_table(_read_book(self.book, reader), low_first=False)


@dataclass(frozen=True)
class EightBit:
    """One int8 weight (height, width) with a scale for each row."""

    codes: TensorRef
    scale: TensorRef
    width: int
    label: str = "bitsandbytes int8"

    @property
    def stored(self) -> tuple[TensorRef, ...]:
        return self.codes, self.scale

    def rows(self, reader: Bytes, start: int, stop: int, out: torch.Tensor) -> None:
        data = reader.read_bytes(self.codes, start * self.width, stop * self.width)
        out.copy_(data.view(torch.int8).view(out.shape))
        scales = read_floats(reader, self.scale, start, stop)
        scale_(out, scales[:, None], self.width, self.scale)
        out.mul_(_PER_CODE)


class BitsAndBytes:
    """Recognises both by their companions."""

    methods = ("bitsandbytes",)
    signature = (*_STATES, ".SCB")
    companions = (".weight.absmax", ".weight.quant_map", ".SCB", ".weight_format", *_STATES)

    def describing(self, tensors: Mapping[str, TensorRef]) -> list[TensorRef]:
        return [ref for name, ref in tensors.items() if name.endswith((*_STATES, ".weight_format"))]

    def weights(self, model: QuantizedModel) -> Iterator[EncodedTensor]:
        for path, state in model.ending(*_STATES):
            yield self._four_bit(model, path, state)
        for path, scale in model.ending(".SCB"):
            yield self._eight_bit(model, path, scale)

    def _four_bit(self, model: QuantizedModel, path: str, ref: TensorRef) -> EncodedTensor:
        state = _read_state(ref, model.reader)
        name = f"{path}.weight"
        height, width = state["shape"]
        numel, block = height * width, state["blocksize"]
        blocks = -(-numel // block)
        codes = model.take(name, owner=ref)
        if codes.nbytes != -(-numel // 2):
            raise fault(
                codes, f"has {codes.nbytes:,} bytes of codes, expected {-(-numel // 2):,} for {[height, width]}"
            )
        book = model.take(f"{name}.quant_map", (16,), owner=codes)
        absmax = model.take(f"{name}.absmax", (blocks,), owner=codes)
        if "nested_blocksize" in state:
            nested = state["nested_blocksize"]
            nested_book = model.take(f"{name}.nested_quant_map", (256,), owner=codes)
            nested_absmax = model.take(f"{name}.nested_absmax", (-(-blocks // nested),), owner=codes)
            scales = Absmax(_of_dtype(absmax, "U8"), nested_book, nested_absmax, nested, state["nested_offset"])
        else:
            scales = Absmax(_of_dtype(absmax, "F32", "F16", "BF16"))
        label = f"bitsandbytes {state['quant_type']}{', double quantized' if scales.book else ''}"
        encoding = FourBit(label, codes, _of_dtype(book, "F32"), scales, ref, block, numel, width)
        return _as_the_class_has_it(model, name, (height, width), encoding, _DTYPES[state["dtype"]])

    def _eight_bit(self, model: QuantizedModel, path: str, scale: TensorRef) -> EncodedTensor:
        name = f"{path}.weight"
        codes = _of_dtype(model.take(name, owner=scale), "I8")
        layout = model.find(f"{path}.weight_format")
        if layout is not None and model.reader.read_bytes(layout, 0, layout.nbytes).any():
            raise UnsupportedError(
                f"{layout.file}: {layout.name} says that the codes are rearranged for a GPU: save the model again with "
                "a current bitsandbytes, or give the 16-bit model with --base."
            )
        if len(codes.shape) != 2 or scale.shape not in ((codes.shape[0],), (codes.shape[0], 1)):
            raise fault(scale, f"is {list(scale.shape)}, expected one scale for each row of {list(codes.shape)}")
        encoding = EightBit(codes, _of_dtype(scale, "F32"), codes.shape[1])
        return _as_the_class_has_it(model, name, codes.shape, encoding)


def _as_the_class_has_it(
    model: QuantizedModel, name: str, shape: tuple[int, int], encoding: Encoding, dtype: str | None = None
) -> EncodedTensor:
    """The codes of a Conv1D are those of the linear layer that replaced it, whose weight is the other way round."""
    if model.config.get("model_type") in _CONV1D_MODELS:
        return model.encoded(name, shape[::-1], Transposed(encoding, *shape), dtype)
    return model.encoded(name, shape, encoding, dtype)


def _of_dtype(ref: TensorRef, *dtypes: str) -> TensorRef:
    if ref.dtype not in dtypes:
        raise fault(ref, f"has dtype {ref.dtype}, expected {' or '.join(dtypes)}")
    return ref


def _read_book(ref: TensorRef, reader: Bytes) -> torch.Tensor:
    """A code book's values, which scales turn into weights: none is larger than 1."""
    book = read_floats(reader, ref, 0, ref.numel)
    if not bool((book.abs() <= 1).all()):
        raise fault(ref, "holds values outside [-1, 1], which no codebook contains: download the model again")
    return book


def _read_state(ref: TensorRef, reader: Bytes) -> dict[str, Any]:
    """The JSON that describes a 4-bit weight, with every field that is used checked."""
    if ref.nbytes > _STATE_BYTES:
        raise fault(ref, f"is {ref.nbytes:,} bytes long, which describes no weight: the file cannot be trusted")
    try:
        state = json.loads(bytes(reader.read_bytes(ref, 0, ref.nbytes).tolist()))
    except (ValueError, RecursionError):
        state = None
    if not isinstance(state, dict):
        raise fault(ref, "is not a JSON object: download the model again")
    shape = state.get("shape")
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(size) is int and size > 0 for size in shape):
        raise fault(ref, f"has shape {shape!r}, expected [rows, columns]")
    if state.get("dtype") not in _DTYPES:
        raise fault(ref, f"has dtype {state.get('dtype')!r}, expected one of {', '.join(_DTYPES)}")
    if state.get("quant_type") != ref.name.rpartition("__")[2]:
        raise fault(ref, f"has quant_type {state.get('quant_type')!r}, which is not what its name says")
    for key in ("blocksize", *(["nested_blocksize"] if "nested_blocksize" in state else [])):
        # Blocks of an odd size would begin within a byte; the library's are powers of two.
        if type(state.get(key)) is not int or not 2 <= state[key] <= 1 << 20 or state[key] % 2:
            raise fault(ref, f"has {key} {state.get(key)!r}, expected an even number of elements")
    if "nested_blocksize" in state:
        offset = state.get("nested_offset")
        # Against a bound: JSON has whole numbers beyond float64, which math.isfinite cannot take; a NaN is below none.
        if not isinstance(offset, int | float) or isinstance(offset, bool) or not abs(offset) <= sys.float_info.max:
            raise fault(ref, f"has nested_offset {offset!r}, expected a number")
    return state
