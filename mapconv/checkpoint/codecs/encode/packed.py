"""Packed integers, written: compressed-tensors, GPTQ; and AWQ's order of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mapconv.checkpoint.codecs.arithmetic import read_floats, unpack_bits, unpack_words
from mapconv.checkpoint.codecs.awq import AwqGemm
from mapconv.checkpoint.codecs.base import Bytes
from mapconv.checkpoint.codecs.encode.base import CodeGrid, Part, WholeNumbers, pack_bits, pack_words
from mapconv.checkpoint.codecs.encode.scales import Groups, as_bytes, as_stored, asymmetric, stored_floats, symmetric
from mapconv.checkpoint.codecs.packed import Packed

#: Which output each nibble of AWQ's words is for.
_AWQ_ORDER = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])


class PackedStore:
    """Integers of 1 to 8 bits in 32-bit words, along the rows or transposed."""

    turned = False

    def __init__(self, encoding: Packed, reader: Bytes, index: int) -> None:
        self._encoding = encoding
        self._levels = WholeNumbers(0, (1 << encoding.bits) - 1)
        scales = read_floats(reader, encoding.scale, 0, encoding.scale.numel).view(encoding.scale.shape)
        self._scales = scales if encoding.order == "rows" else scales.T.contiguous()
        self._zeros = self._stored_zeros(reader)
        self._groups = Groups(encoding.height, self._group_of(reader), encoding.groups)

    @property
    def grid(self) -> CodeGrid:
        return CodeGrid(self._levels, self._scales, self._groups.group_of, self._zeros)

    def rescale(self, wanted: torch.Tensor) -> None:
        encoding, encode = self._encoding, as_stored(self._encoding.scale.dtype)
        if encoding.zero is None:
            self._scales = symmetric(wanted, self._groups, self._levels, encoding.zero_offset, encode)
        else:
            self._scales, self._zeros = asymmetric(wanted, self._groups, self._levels, encoding.zero_offset, encode)

    def parts(self, levels: torch.Tensor) -> Sequence[Part]:
        encoding, by_rows = self._encoding, self._encoding.order == "rows"
        codes = self._pack(levels.to(torch.uint8), encoding.codes.nbytes // len(levels))
        scales = stored_floats(self._scales if by_rows else self._scales.T, encoding.scale.dtype)
        parts = [
            (encoding.codes, 0, as_bytes(codes if by_rows else codes.view(torch.int32).T)),
            (encoding.scale, 0, as_bytes(scales)),
        ]
        if encoding.zero is not None:
            zeros = (self._zeros - encoding.zero_offset).T.to(torch.uint8)
            packed = self._pack(zeros, encoding.zero.nbytes // len(zeros))
            parts.append((encoding.zero, 0, as_bytes(packed.view(torch.int32).T if by_rows else packed)))
        return parts

    def _pack(self, codes: torch.Tensor, nbytes: int) -> torch.Tensor:
        if self._encoding.padded:
            return pack_words(codes, self._encoding.bits)
        return pack_bits(codes, self._encoding.bits, nbytes)

    def _stored_zeros(self, reader: Bytes) -> torch.Tensor:
        """(n or 1, groups), as they are subtracted."""
        encoding, ref = self._encoding, self._encoding.zero
        if ref is None:
            return torch.full((1, encoding.groups), float(encoding.zero_offset))
        words = reader.read_bytes(ref, 0, ref.nbytes).view(torch.int32).view(ref.shape)
        streams = (words.T if encoding.order == "rows" else words).contiguous().view(torch.uint8)
        unpack = unpack_words if encoding.padded else unpack_bits
        streams = streams.view(encoding.groups, -1)
        return (unpack(streams, encoding.bits, encoding.height).T + encoding.zero_offset).float().contiguous()

    def _group_of(self, reader: Bytes) -> torch.Tensor:
        encoding, ref = self._encoding, self._encoding.group_index
        following = torch.arange(encoding.width) // encoding.group
        if ref is None:
            return following
        index = reader.read_bytes(ref, 0, ref.nbytes).view(torch.int32).long()
        return following if bool((index == -1).all()) else index


class AwqStore:
    """4 bits, eight outputs to a word."""

    turned = False
    _LEVELS = WholeNumbers(0, 15)

    def __init__(self, encoding: AwqGemm, reader: Bytes, index: int) -> None:
        self._encoding = encoding
        self._scales = read_floats(reader, encoding.scale, 0, encoding.scale.numel).view(encoding.scale.shape).T
        words = reader.read_bytes(encoding.zero, 0, encoding.zero.nbytes).view(torch.uint8)
        nibbles = unpack_bits(words.view(encoding.scale.shape[0], -1), 4, encoding.height)
        self._zeros = torch.empty_like(nibbles).view(len(nibbles), -1, 8)
        self._zeros[:, :, _AWQ_ORDER] = nibbles.view(len(nibbles), -1, 8)
        self._zeros = self._zeros.view(len(nibbles), -1).T.float()
        self._groups = Groups(encoding.height, torch.arange(encoding.width) // encoding.group, encoding.scale.shape[0])

    @property
    def grid(self) -> CodeGrid:
        return CodeGrid(self._LEVELS, self._scales, self._groups.group_of, self._zeros)

    def rescale(self, wanted: torch.Tensor) -> None:
        encode = as_stored(self._encoding.scale.dtype)
        self._scales, self._zeros = asymmetric(wanted, self._groups, self._LEVELS, 0, encode)

    def parts(self, levels: torch.Tensor) -> Sequence[Part]:
        encoding = self._encoding
        return [
            (encoding.codes, 0, self._pack(levels.T)),
            (encoding.zero, 0, self._pack(self._zeros.T)),
            (encoding.scale, 0, as_bytes(stored_floats(self._scales.T, encoding.scale.dtype))),
        ]

    def _pack(self, codes: torch.Tensor) -> torch.Tensor:
        eights = codes.to(torch.uint8).contiguous().view(len(codes), -1, 8)[:, :, _AWQ_ORDER].reshape(len(codes), -1)
        return as_bytes(pack_bits(eights, 4, eights.shape[1] // 2))
