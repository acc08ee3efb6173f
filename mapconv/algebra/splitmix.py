"""Random numbers that depend on a key and an index alone: SplitMix64 (Steele, Lea, Flood 2014), from any index on."""

from __future__ import annotations

import torch

_GAMMA, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def uniform(key: int, first: int, count: int) -> torch.Tensor:
    """Outputs ``first`` … ``first + count`` for a seed (int64), (count,) float64: their upper 53 bits as fractions."""
    state = torch.arange(first + 1, first + count + 1) * _signed(_GAMMA) + _signed(key)
    state = (state ^ _shifted(state, 30)) * _signed(_MIX_1)
    state = (state ^ _shifted(state, 27)) * _signed(_MIX_2)
    return _shifted(state ^ _shifted(state, 31), 11).double() * 2.0**-53


def _signed(value: int) -> int:
    """The int64 of the same bits: torch multiplies and adds modulo 2⁶⁴, as SplitMix64 does."""
    return value - (1 << 64) if value >> 63 == 1 else value


def _shifted(values: torch.Tensor, count: int) -> torch.Tensor:
    """A shift that brings in zeros, where torch's own brings in copies of the sign."""
    return (values >> count) & ((1 << (64 - count)) - 1)
