"""Codes to float32: tables, bit streams and scales. All is computed in float32, whatever scales are stored in."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from mapconv.adapter import TensorRef
from mapconv.checkpoint.codecs.base import Bytes, fault

#: The values of a 4-bit float with two exponent bits and one of mantissa; bit 3 is the sign.
_E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = torch.tensor([sign * value for sign in (1.0, -1.0) for value in _E2M1_MAGNITUDES])


def _byte_values(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(256, dtype=torch.uint8).view(dtype).float()


def _powers_of_two() -> torch.Tensor:
    """2^(byte − 127), the exponents of MX formats; 255 is their NaN."""
    values = torch.ldexp(torch.ones(256), torch.arange(256) - 127)
    values[255] = math.nan
    return values


#: What each byte stands for, by the safetensors name of its dtype. A lookup is faster than torch's own conversion.
BYTE_VALUES = {
    "F8_E4M3": _byte_values(torch.float8_e4m3fn),
    "F8_E5M2": _byte_values(torch.float8_e5m2),
    "F8_E8M0": _powers_of_two(),
    "I8": _byte_values(torch.int8),
    "U8": _byte_values(torch.uint8),
}
#: Scales that a thread keeps of the weight that it decodes, at most: 8 MB.
KEPT_SCALES = 1 << 21
_FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


def nibble_table(values: torch.Tensor, *, low_first: bool) -> torch.Tensor:
    """What each byte of two 4-bit codes stands for, (256,): a pair of float32 in the bits of one float64."""
    byte = torch.arange(256)
    low, high = values[byte & 15], values[byte >> 4]
    pairs = torch.stack([low, high] if low_first else [high, low], dim=1)
    return pairs.contiguous().view(torch.float64).view(-1)


def expand_nibbles(codes: torch.Tensor, table: torch.Tensor, out: torch.Tensor) -> None:
    """Write the two values of each byte of ``codes`` (n,) into ``out`` (2n,), contiguous float32."""
    if out.storage_offset() % 2:  # cannot be seen as pairs
        aligned = torch.empty_like(out)
        expand_nibbles(codes, table, aligned)
        out.copy_(aligned)
        return
    torch.index_select(table, 0, codes.int(), out=out.view(torch.float64))


def expand_bytes(codes: torch.Tensor, dtype: str, out: torch.Tensor) -> None:
    """Write the value of each byte of ``codes`` (n,) into ``out`` (n,), contiguous float32."""
    if dtype == "F8_E4M3" and not _has_nan(codes):
        _expand_e4m3(codes, out)
        return
    torch.index_select(BYTE_VALUES[dtype], 0, codes.int(), out=out)


def _has_nan(codes: torch.Tensor) -> bool:
    """Whether a byte is a NaN of E4M3: 0x7f, the largest signed one, or 0xff, the largest unsigned one."""
    values = codes.numpy()
    return bool(values.size) and bool(values.max() == 0xFF or values.view(np.int8).max() == 0x7F)


def _expand_e4m3(codes: torch.Tensor, out: torch.Tensor) -> None:
    """Finite codes by way of float16, whose exponents are 8 larger: exact, and twice as fast as a lookup."""
    # Widening copies the sign into bit 14 as well, from which it is taken off again.
    halves = codes.view(torch.int8).to(torch.int16).mul_(1 << 7).bitwise_and_(~(1 << 14))
    out.copy_(halves.view(torch.float16)).mul_(1 << 8)


def unpack_bits(codes: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The first ``count`` codes of each row of a little-endian bit stream: (n, bytes) uint8 to (n, count) int64."""
    # Eight codes of b bits take b bytes: at most 56 bits, so one int64 holds them.
    groups = -(-count // 8)
    padded = torch.nn.functional.pad(codes, (0, max(0, groups * bits - codes.shape[1])))[:, : groups * bits]
    eights = padded.reshape(len(codes), groups, bits).long()
    joined = sum((eights[:, :, byte] << (8 * byte) for byte in range(bits)), start=torch.tensor(0))
    shifts = torch.arange(0, 8 * bits, bits)
    # Eight codes of 8 bits reach the sign bit, which the mask takes off again.
    return ((joined[:, :, None] >> shifts) & ((1 << bits) - 1)).reshape(len(codes), -1)[:, :count]


def unpack_words(codes: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The same where each 32-bit word holds 32 // bits codes, and what is left of it nothing."""
    words = codes.contiguous().view(torch.int32).long()
    shifts = torch.arange(0, 32 // bits * bits, bits)
    return ((words[:, :, None] >> shifts) & ((1 << bits) - 1)).reshape(len(codes), -1)[:, :count]


def read_floats(reader: Bytes, ref: TensorRef, start: int, stop: int, dtype: str | None = None) -> torch.Tensor:
    """Elements ``start`` to ``stop`` of a tensor in float32; ``dtype``: what its bytes are, where not its own."""
    dtype = dtype or ref.dtype
    if dtype in _FLOATS:
        size = _FLOATS[dtype].itemsize
        return reader.read_bytes(ref, start * size, stop * size).view(_FLOATS[dtype]).float()
    values = torch.empty(stop - start)
    expand_bytes(reader.read_bytes(ref, start, stop), dtype, values)
    return values


def require_scales(scales: torch.Tensor, ref: TensorRef) -> None:
    """Refuse scales that hold NaN or infinity."""
    if not math.isfinite(scales.sum().item()) and not torch.isfinite(scales).all():
        raise fault(ref, "holds NaN or infinity, which cannot scale a weight: download the model again")


def kept_scales(
    reader: Bytes,
    owner: TensorRef,
    ref: TensorRef,
    shape: tuple[int, int],
    part: tuple[int, int],
    make: Callable[[int, int], torch.Tensor],
) -> tuple[torch.Tensor, bool]:
    """Some of a weight's scales, and whether all are known to be finite and not zero.

    Those of a weight of moderate size are made once for all of its row blocks, whose decoding they would hold up.

    Args:
        owner: the weight's codes.
        ref: where the scales are from, for messages.
        shape: of all scales, by rows of the weight or by blocks.
        part: the first row wanted, and the one behind the last.
        make: rows (start, stop) of the scales, float32.
    """
    count, width = shape
    if count * width > KEPT_SCALES:
        return make(*part), False

    def whole() -> tuple[torch.Tensor, bool]:
        scales = make(0, count)
        require_scales(scales, ref)
        return scales, bool(scales.all())

    scales, sound = reader.kept(owner, ref.name, whole)
    return scales[slice(*part)], sound


def scale_(
    values: torch.Tensor,
    scales: torch.Tensor,
    width: int,
    ref: TensorRef,
    *,
    zero_is_lost: bool = True,
    sound: bool = False,
) -> None:
    """Multiply each run of ``width`` columns of ``values`` (n, m) by its scale, in place; the last run may be short.

    Args:
        values: float32.
        scales: (n or 1, ⌈m / width⌉) float32.
        width: columns that share a scale.
        ref: where the scales are from, for messages.
        zero_is_lost: whether a scale of zero loses codes, so that it is refused unless they are zero too.
        sound: all scales are known to be finite and not zero.

    Raises:
        CheckpointError: a scale that is not finite, or one of zero for codes that are not.
    """
    if not sound:
        require_scales(scales, ref)
    for part, factors in _runs(values, scales, width):
        if zero_is_lost and not sound and not factors.all():
            lost = (factors == 0) & (part != 0)
            if lost.any():
                raise fault(ref, "has a scale of zero for codes that are not zero: download the model again")
        part.mul_(factors)


def shift_(values: torch.Tensor, offsets: torch.Tensor, width: int) -> None:
    """Add to each run of ``width`` columns its offset, in place; shapes as in ``scale_``."""
    for part, terms in _runs(values, offsets, width):
        part.add_(terms)


def _runs(values: torch.Tensor, numbers: torch.Tensor, width: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """``values`` as whole runs (n, runs, width) and what is left of it, each with its numbers."""
    columns = values.shape[1]
    whole = columns // width
    parts = []
    if whole:
        head = values[:, : whole * width].unflatten(1, (whole, width))
        parts.append((head, numbers[:, :whole, None]))
    if columns % width:
        parts.append((values[:, whole * width :], numbers[:, whole:]))
    return parts
