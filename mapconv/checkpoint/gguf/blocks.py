"""GGUF's block types: how the bytes of a block stand for its values, in float32.

Formulas are ggml's
(ggml-quants.c, dequantize_row_*); products and sums are formed in its order, so that results are its own bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

#: 4-bit floats (E2M1) times 2, and 2^(byte − 128) to go with them; 0 and 1 give subnormal numbers.
_DOUBLED = torch.tensor([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12.0])
_HALF_POWERS = torch.cat([torch.tensor([1 << 21, 1 << 22]), torch.arange(1, 255) << 23]).int().view(torch.float32)
#: Values of the codes of the non-linear 4-bit types.
_NONLINEAR = torch.tensor([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113.0])
_BITS = torch.arange(8, dtype=torch.uint8)
_PAIRS = torch.arange(0, 8, 2, dtype=torch.uint8)

#: Takes blocks (n, nbytes) uint8, writes values (n, elements) float32.
Expand = Callable[[torch.Tensor, torch.Tensor], None]


def _half(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """The float16 that begins at byte ``start`` of each block, (n, 1) float32."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _float_values(dtype: torch.dtype) -> Expand:
    def expand(blocks: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(blocks.contiguous().view(dtype))

    return expand


def _q4(codes: torch.Tensor, out: torch.Tensor) -> None:
    """16 bytes: the low nibbles are the first half of the block."""
    torch.bitwise_and(codes, 15, out=(low := torch.empty_like(codes)))
    out[:, :16], out[:, 16:] = low, codes >> 4


def _q5(blocks: torch.Tensor, start: int, out: torch.Tensor) -> None:
    """As ``_q4``, with the fifth bits of all 32 values before."""
    _q4(blocks[:, start + 4 : start + 20], out)
    fifth = (blocks[:, start : start + 4, None] >> _BITS) & 1
    out.add_(fifth.reshape(len(blocks), 32), alpha=16)


def _q4_0(blocks: torch.Tensor, out: torch.Tensor) -> None:
    _q4(blocks[:, 2:], out)
    out.sub_(8).mul_(_half(blocks, 0))


def _q4_1(blocks: torch.Tensor, out: torch.Tensor) -> None:
    _q4(blocks[:, 4:], out)
    out.mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q5_0(blocks: torch.Tensor, out: torch.Tensor) -> None:
    _q5(blocks, 2, out)
    out.sub_(16).mul_(_half(blocks, 0))


def _q5_1(blocks: torch.Tensor, out: torch.Tensor) -> None:
    _q5(blocks, 4, out)
    out.mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q8_0(blocks: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(blocks[:, 2:].view(torch.int8)).mul_(_half(blocks, 0))


def _iq4_nl(blocks: torch.Tensor, out: torch.Tensor) -> None:
    _looked_up(blocks[:, 2:], _NONLINEAR, out)
    out.mul_(_half(blocks, 0))


def _mxfp4(blocks: torch.Tensor, out: torch.Tensor) -> None:
    _looked_up(blocks[:, 1:], _DOUBLED, out)
    out.mul_(_HALF_POWERS[blocks[:, :1].int()])


def _looked_up(codes: torch.Tensor, values: torch.Tensor, out: torch.Tensor) -> None:
    """As ``_q4``, each code an index of ``values``."""
    out[:, :16], out[:, 16:] = values[(codes & 15).int()], values[(codes >> 4).int()]


def _six_bit_pairs(blocks: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight scales and eight offsets of 6 bits, in 12 bytes: (n, 8) uint8 each."""
    first, second, rest = (blocks[:, start + at : start + at + 4] for at in (0, 4, 8))
    scales = torch.cat([first & 63, (rest & 15) | ((first >> 2) & 48)], 1)
    offsets = torch.cat([second & 63, (rest >> 4) | ((second >> 2) & 48)], 1)
    return scales, offsets


def _groups(values: torch.Tensor, groups: int) -> torch.Tensor:
    return values.view(len(values), groups, -1)


def _scaled(out: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor | None = None) -> None:
    """Multiply each group of a block by its scale, and take its offset away."""
    groups = _groups(out, scales.shape[1]).mul_(scales[:, :, None])
    if offsets is not None:
        groups.sub_(offsets[:, :, None])


def _q2_k(blocks: torch.Tensor, out: torch.Tensor) -> None:
    scales = blocks[:, :16]
    _two_bits(blocks[:, 16:80], out)
    _scaled(out, _half(blocks, 80) * (scales & 15).float(), _half(blocks, 82) * (scales >> 4).float())


def _two_bits(codes: torch.Tensor, out: torch.Tensor) -> None:
    """64 bytes: each half of them holds 128 values, a pair of bits of 32 bytes after another."""
    codes = codes.unflatten(1, (2, 1, 32))
    out.view(-1, 2, 4, 32).copy_((codes >> _PAIRS[:, None]) & 3)


def _q3_k(blocks: torch.Tensor, out: torch.Tensor) -> None:
    # A third bit of 1 means that nothing is taken away.
    third = (blocks[:, None, :32] >> _BITS[:, None]) & 1
    _two_bits(blocks[:, 32:96], out)
    out.view(-1, 8, 32).add_(third, alpha=4).sub_(4)
    low, high = blocks[:, 96:104], blocks[:, None, 104:108]
    scales = torch.cat([low & 15, low >> 4], 1) | (((high >> _PAIRS[:, None]) & 3) << 4).flatten(1)
    _scaled(out, _half(blocks, 108) * (scales.float() - 32))


def _q4_k(blocks: torch.Tensor, out: torch.Tensor) -> None:
    _nibble_runs(blocks[:, 16:], out)
    scales, offsets = _six_bit_pairs(blocks, 4)
    _scaled(out, _half(blocks, 0) * scales.float(), _half(blocks, 2) * offsets.float())


def _nibble_runs(codes: torch.Tensor, out: torch.Tensor) -> None:
    """128 bytes in runs of 32: 64 values each, the low nibbles first."""
    codes = codes.unflatten(1, (4, 32))
    runs = out.view(-1, 4, 2, 32)
    runs[:, :, 0], runs[:, :, 1] = codes & 15, codes >> 4


def _q5_k(blocks: torch.Tensor, out: torch.Tensor) -> None:
    _nibble_runs(blocks[:, 48:], out)
    fifth = (blocks[:, None, 16:48] >> _BITS[:, None]) & 1
    out.view(-1, 8, 32).add_(fifth, alpha=16)
    scales, offsets = _six_bit_pairs(blocks, 4)
    _scaled(out, _half(blocks, 0) * scales.float(), _half(blocks, 2) * offsets.float())


def _q6_k(blocks: torch.Tensor, out: torch.Tensor) -> None:
    low, high = blocks[:, :128].unflatten(1, (2, 64)), blocks[:, 128:192].unflatten(1, (2, 1, 32))
    halves = out.view(-1, 2, 2, 64)
    halves[:, :, 0], halves[:, :, 1] = low & 15, low >> 4
    out.view(-1, 2, 4, 32).add_((high >> _PAIRS[:, None]) & 3, alpha=16).sub_(32)
    _scaled(out, _half(blocks, 208) * blocks[:, 192:208].view(torch.int8).float())


def _iq4_xs(blocks: torch.Tensor, out: torch.Tensor) -> None:
    low, codes = blocks[:, 4:8], blocks[:, 8:].unflatten(1, (8, 16))
    runs = out.view(-1, 8, 2, 16)
    runs[:, :, 0], runs[:, :, 1] = _NONLINEAR[(codes & 15).int()], _NONLINEAR[(codes >> 4).int()]
    lows = torch.stack([low & 15, low >> 4], 2).flatten(1)
    highs = ((blocks[:, 2:4, None] >> _PAIRS) & 3).flatten(1)
    _scaled(out, _half(blocks, 0) * ((lows | (highs << 4)).float() - 32))


#: By the names of the types.
EXPAND: dict[str, Expand] = {
    "F32": _float_values(torch.float32),
    "F16": _float_values(torch.float16),
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "BF16": _float_values(torch.bfloat16),
    "MXFP4": _mxfp4,
}
