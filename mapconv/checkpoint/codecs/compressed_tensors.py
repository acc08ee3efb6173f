"""compressed-tensors (llm-compressor, vLLM): float8 and int8 with scales, packed integers, NVFP4 and MXFP4.

What a module's tensors are is read from their names and dtypes; the configuration's groups give what shapes leave open
(bits, group sizes, blocks). A model may mix formats.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from mapconv.adapter import TensorRef
from mapconv.checkpoint.codecs.base import EncodedTensor, QuantizedModel, fault
from mapconv.checkpoint.codecs.packed import Packed
from mapconv.checkpoint.codecs.scaled import scaled_bytes
from mapconv.checkpoint.codecs.small_floats import SmallFloats

_FLOATS = ("F32", "F16", "BF16")


class CompressedTensors:
    """Recognises each module by ``weight_packed``, or by a weight with ``weight_scale``."""

    methods = ("compressed-tensors", "compressed_tensors")
    signature = (".weight_packed",)
    companions = (
        ".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_shape", ".weight_g_idx",
        ".weight_global_scale",
    )  # fmt: skip

    def describing(self, tensors: Mapping[str, TensorRef]) -> list[TensorRef]:
        return [ref for name, ref in tensors.items() if name.endswith(".weight_shape")]

    def weights(self, model: QuantizedModel) -> Iterator[EncodedTensor]:
        for path, codes in model.ending(".weight_packed"):
            packed = _packed if codes.dtype == "I32" else _small_floats
            yield packed(model, path, codes, _scheme(model, path))
        for path, scale in model.ending(".weight_scale"):
            codes = model.take(f"{path}.weight", owner=scale)
            zero = model.find(f"{path}.weight_zero_point")
            label = f"compressed-tensors {'int8' if codes.dtype == 'I8' else 'FP8'}"
            block = _block(_scheme(model, path))
            if block is None and scale.dtype == "U8":
                block = (1, 32)
            encoding = scaled_bytes(label, codes, scale, block=block, zero=zero)
            yield model.encoded(codes.name, codes.shape, encoding)


def _packed(model: QuantizedModel, path: str, codes: TensorRef, scheme: Mapping[str, Any]) -> EncodedTensor:
    """Integers of 1 to 8 bits in 32-bit words; zero points are packed along the other side."""
    description = model.take(f"{path}.weight_shape", owner=codes)
    height, width = _shape(model, description)
    if len(codes.shape) != 2 or codes.shape[0] != height:
        raise fault(codes, f"is {list(codes.shape)}, but {description.name} says {[height, width]}")
    bits, padded = _bits(codes, width, scheme)
    scale = model.take(f"{path}.weight_scale", owner=codes)
    groups = scale.shape[1] if len(scale.shape) == 2 else 1
    group = _size(scheme.get("group_size")) or -(-width // max(1, groups))
    if scale.dtype not in _FLOATS or scale.shape != (height, groups) or not groups:
        raise fault(scale, f"is {scale.dtype} {list(scale.shape)}, expected {height} rows of scales")
    index = model.find(f"{path}.weight_g_idx")
    if groups == 1:
        group = width
    elif index is None and -(-width // group) != groups:
        raise fault(scale, f"is {list(scale.shape)}, expected {-(-width // group)} groups of {group} columns")
    if index is not None and (index.shape != (width,) or index.dtype != "I32"):
        raise fault(index, f"is {index.dtype} {list(index.shape)}, expected I32 {[width]}")
    zero = model.find(f"{path}.weight_zero_point")
    if zero is not None:
        words = -(-height // (32 // bits)) if padded else -(-height * bits // 32)
        if zero.dtype != "I32" or zero.shape != (words, groups):
            raise fault(zero, f"is {zero.dtype} {list(zero.shape)}, expected I32 {[words, groups]}")
    encoding = Packed(
        f"compressed-tensors int{bits}",
        codes,
        scale,
        bits,
        height,
        width,
        group,
        padded=padded,
        zero=zero,
        zero_offset=0 if zero is not None else 1 << (bits - 1),
        group_index=index,
        described_by=(description,),
    )
    return model.encoded(f"{path}.weight", (height, width), encoding)


def _small_floats(model: QuantizedModel, path: str, codes: TensorRef, scheme: Mapping[str, Any]) -> EncodedTensor:
    """NVFP4, with scales in float8 over one for the weight, or MXFP4, with powers of two."""
    if codes.dtype != "U8" or len(codes.shape) != 2:
        raise fault(
            codes, f"is {codes.dtype} {list(codes.shape)}, expected packed integers or U8 pairs of 4-bit floats"
        )
    height, width = codes.shape[0], 2 * codes.shape[1]
    scale, overall = model.take(f"{path}.weight_scale", owner=codes), model.find(f"{path}.weight_global_scale")
    kind, dtype, group = ("NVFP4", "F8_E4M3", 16) if overall is not None else ("MXFP4", "U8", 32)
    group = _size(scheme.get("group_size")) or group
    if scale.dtype != dtype or scale.shape != (height, -(-width // group)):
        raise fault(
            scale, f"is {scale.dtype} {list(scale.shape)}, expected {dtype} {[height, -(-width // group)]} for {kind}"
        )
    if overall is not None and (overall.numel != 1 or overall.dtype not in _FLOATS):
        raise fault(overall, f"is {overall.dtype} {list(overall.shape)}, expected one float")
    encoding = SmallFloats(
        f"compressed-tensors {kind}",
        codes,
        scale,
        width,
        group,
        scale_dtype="F8_E8M0" if overall is None else None,
        overall=overall,
        overall_is="divisor",
    )
    return model.encoded(f"{path}.weight", (height, width), encoding)


def _shape(model: QuantizedModel, ref: TensorRef) -> tuple[int, int]:
    if ref.dtype not in ("I64", "I32") or ref.numel != 2:
        raise fault(ref, f"is {ref.dtype} {list(ref.shape)}, expected two sizes")
    values = model.reader.read_bytes(ref, 0, ref.nbytes)
    height, width = values.view(torch.int64 if ref.dtype == "I64" else torch.int32).tolist()
    if not (0 < height <= 1 << 31 and 0 < width <= 1 << 31):
        raise fault(ref, f"says {[height, width]}, which is not a weight's shape")
    return height, width


def _bits(codes: TensorRef, width: int, scheme: Mapping[str, Any]) -> tuple[int, bool]:
    """(bits, whether words are padded): by the words that a row has, the configuration's own number first."""
    named = scheme.get("num_bits")
    for bits in [*([named] if named in range(1, 9) else []), *range(1, 9)]:
        if -(-width * bits // 32) == codes.shape[1]:
            return bits, False
        if bits == named and -(-width // (32 // bits)) == codes.shape[1]:
            return bits, True
    raise fault(codes, f"is {list(codes.shape)}, which fits no number of bits for {width} columns")


def _block(scheme: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns that share a scale, where the scheme says so."""
    structure = scheme.get("block_structure")
    if isinstance(structure, str):
        structure = structure.split("x")
    if isinstance(structure, list) and len(structure) == 2:
        height, width = (_size(int(size) if str(size).isdecimal() else None) for size in structure)
        if height and width:
            return height, width
    group = _size(scheme.get("group_size"))
    return None if group is None else (1, group)


def _size(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None


def _scheme(model: QuantizedModel, path: str) -> Mapping[str, Any]:
    """How the configuration says that a module's weight is quantized: by its name, by a pattern, else by a class."""
    groups = model.settings.get("config_groups")
    found: Mapping[str, Any] = {}
    rank = 0
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            continue
        for target in group.get("targets") or ():
            fit = _fit(str(target), path)
            if fit > rank:
                found, rank = weights, fit
    return found


def _fit(target: str, path: str) -> int:
    """3: the module's name, 2: a pattern that matches it, 1: the name of a class, which may be its own; 0: none."""
    if target.startswith("re:"):
        try:
            return 2 if re.match(target[3:], path) else 0
        except re.error:
            return 0
    if target == path or path.endswith(f".{target}"):
        return 3
    return 1 if target.isidentifier() and target[0].isupper() else 0
