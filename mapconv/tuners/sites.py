"""Where a method's layers go: the weight of each as its layer holds it, and base layers that take no memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from mapconv.adapter import Module, TensorRef

LayerKind = Literal["linear", "transposed", "conv", "embedding"]
_PREFIX = "base_model.model."
#: What is built at a time at most: layers, and bytes of their tensors and weights. Some methods derive as much as a
#: weight has from its size alone.
GROUP_LAYERS, GROUP_BYTES = 32, 32 << 20
_CONVOLUTIONS = {3: torch.nn.Conv1d, 4: torch.nn.Conv2d, 5: torch.nn.Conv3d}


@dataclass(frozen=True)
class Site:
    """Where a layer goes: an adapted module, and its weight's kind and shape as the layer holds it; where that lies on
    disk, which is the order in which layers are merged."""

    module: Module
    kind: LayerKind
    shape: tuple[int, ...]
    has_bias: bool
    position: tuple[str, int]

    @property
    def path(self) -> str:
        return self.module.path

    @property
    def weight_bytes(self) -> int:
        """Of the weight in float32."""
        return 4 * math.prod(self.shape)


def chunks(sites: Sequence[Site]) -> Iterator[list[Site]]:
    """Neighbours that take ``GROUP_BYTES`` together, and one that takes more by itself."""
    group: list[Site] = []
    nbytes = 0
    for site in sites:
        own = site.weight_bytes + sum(ref.nbytes for _, ref in site.module.own)
        if group and (nbytes + own > GROUP_BYTES or len(group) == GROUP_LAYERS):
            yield group
            group, nbytes = [], 0
        group.append(site)
        nbytes += own
    if group:
        yield group


def keyed(site: Site) -> list[tuple[str, TensorRef]]:
    """A layer's tensors by the key that PEFT gives them in a model that calls the module ``site.path``."""
    return [(f"{_PREFIX}{site.path}.{name}", ref) for name, ref in site.module.own]


def base_layer(site: Site) -> torch.nn.Module:
    """The layer that PEFT wraps, with a weight and a bias that take no memory."""
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        if site.kind == "linear":
            layer: torch.nn.Module = torch.nn.Linear(site.shape[1], site.shape[0], bias=site.has_bias)
        elif site.kind == "transposed":
            layer = Conv1D(site.shape[1], site.shape[0])
        elif site.kind == "embedding":
            layer = torch.nn.Embedding(site.shape[0], site.shape[1])
        else:
            out, inputs, *kernel = site.shape
            layer = _CONVOLUTIONS[len(site.shape)](inputs, out, tuple(kernel), bias=site.has_bias)
    held = getattr(layer, "bias", None)
    bias = weightless(held.shape) if isinstance(held, torch.Tensor) else None
    return hold(layer, weightless(site.shape), bias)


def hold(layer: torch.nn.Module, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.nn.Module:
    """Put values into a base layer."""
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = torch.nn.Parameter(bias, requires_grad=False)
    return layer


def weightless(shape: Sequence[int]) -> torch.Tensor:
    """Zeros of any shape in the memory of one."""
    return torch.zeros(()).expand(tuple(shape))
