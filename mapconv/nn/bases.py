"""The model's own layers as the mathematics sees them: the kind of a layer, its weight as one matrix (out, in).

Values are read where they are: a layer that accelerate keeps on another device or on disk is brought in for the time
that a reading takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import nn

from mapconv.algebra.fingerprint import Fingerprint, matrix_fingerprint
from mapconv.algebra.norms import BLOCK_ELEMENTS, row_blocks
from mapconv.errors import UnsupportedError

Kind = Literal["linear", "transposed", "conv", "embedding"]
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def kind_of(module: nn.Module) -> Kind | None:
    """How the layer stores its weight; None for a module that cannot be adapted."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, Conv1D):
        return "transposed"
    if isinstance(module, nn.Embedding):
        return "embedding"
    return "conv" if isinstance(module, _CONVOLUTIONS) else None


def is_grouped(module: nn.Module) -> bool:
    """Whether the layer is a convolution with groups, which cannot be adapted."""
    return isinstance(module, _CONVOLUTIONS) and module.groups > 1


def weight_of(layer: Any) -> nn.Parameter:
    """The weight of a layer that ``kind_of`` knows; to torch's types, any attribute of a module may be a module."""
    return layer.weight


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of the layer's weight as a matrix: a kernel counts as inputs, a vocabulary too."""
    shape = weight_of(module).shape
    if kind_of(module) in ("transposed", "embedding"):
        return shape[1], shape[0]
    return shape[0], shape[1:].numel()


def matrix(module: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """The weight as a view (out, in)."""
    return weight.t() if kind_of(module) in ("transposed", "embedding") else weight.flatten(1)


def execution_device(module: nn.Module, parameter: str = "weight") -> torch.device:
    """Where the layer computes, which an accelerate hook may know better than its parameter."""
    hook = getattr(module, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return getattr(module, parameter).device if device is None else torch.device(device)


@contextmanager
def values_of(module: nn.Module, path: str) -> Iterator[torch.Tensor]:
    """The weight with its values, as the matrix (out, in).

    Raises:
        UnsupportedError: as ``values_in`` does.
    """
    with values_in(module, "weight", path) as weight:
        yield matrix(module, weight)


@contextmanager
def values_in(module: nn.Module, name: str, path: str) -> Iterator[torch.Tensor]:
    """A parameter of a module with its values; errors call it ``path``.

    Raises:
        UnsupportedError: a parameter on the meta device, which has none, or one that is quantized.
    """
    with _brought_in(module):
        weight = getattr(module, name).detach()
        if weight.device.type == "meta":
            raise UnsupportedError(f"{path} is on the meta device and has no values: load the model's weights first.")
        if weight.dtype.itemsize < 2 or not weight.is_floating_point():
            raise UnsupportedError(
                f"{path} has dtype {weight.dtype}: adapters can only be attached to plain weights, "
                "so load the 16- or 32-bit model."
            )
        yield weight


def _brought_in(module: nn.Module) -> Any:
    if not hasattr(module, "_hf_hook"):
        return nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module)


def base_fingerprint(module: nn.Module, path: str) -> Fingerprint:
    """‖W0‖ and W0's random projection, accumulated in float64."""
    with values_of(module, path) as weight:
        return matrix_fingerprint(weight)


def row_squares(weight: torch.Tensor) -> torch.Tensor:
    """‖W0_i‖² of each row of a matrix (n, m) as (n,) float64; rows of a transposed one are read column by column."""
    result = torch.zeros(weight.shape[0], dtype=torch.float64, device=weight.device)
    if weight.is_contiguous():
        for start, stop in _blocks(weight):
            result[start:stop] = weight[start:stop].double().square().sum(1)
    else:
        for start, stop in _blocks(weight.t()):
            result += weight[:, start:stop].double().square().sum(1)
    return result


def row_inner(weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """⟨W0_i, (BA)_i⟩ of each row, (n,): one pass over W0 block by block, and no (n, m) product."""
    if weight.is_contiguous():
        result = torch.empty(weight.shape[0], dtype=dtype, device=weight.device)
        for start, stop in _blocks(weight):
            result[start:stop] = ((weight[start:stop].to(dtype) @ A.to(dtype).t()) * B[start:stop].to(dtype)).sum(1)
        return result
    product = torch.zeros(weight.shape[0], A.shape[0], dtype=dtype, device=weight.device)
    for start, stop in _blocks(weight.t()):
        product += weight[:, start:stop].to(dtype) @ A[:, start:stop].to(dtype).t()
    return (product * B.to(dtype)).sum(1)


def merged_row_norms(
    weight: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    *,
    base_squares: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """‖W0 + BA‖ of each row, (n,) float64; ``dtype`` is what the products with W0 are formed in."""
    wide_A, wide_B = A.double(), B.double()
    own = ((wide_B @ (wide_A @ wide_A.t())) * wide_B).sum(1)
    base_squares = row_squares(weight) if base_squares is None else base_squares
    return (base_squares + 2 * row_inner(weight, A, B, dtype).double() + own).clamp_min(0).sqrt()


def _blocks(stored: torch.Tensor) -> Iterator[tuple[int, int]]:
    """Row ranges: of a size that fits a core's cache, or that keeps a GPU busy."""
    rows, width = stored.shape
    return row_blocks(rows, width, BLOCK_ELEMENTS if stored.device.type == "cpu" else 64 * BLOCK_ELEMENTS)
