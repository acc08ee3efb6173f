"""Weights that another method than LoRA adapts: placed modules as layers of PEFT's, and what they merge to."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch

from mapconv.checkpoint.reader import TensorReader
from mapconv.placement.weights import PlacedModule, read_weight
from mapconv.spelling import TunerMethod
from mapconv.tuners.layers import TunerLayers
from mapconv.tuners.sites import LayerKind, Site


class TunedWeights:
    """The merged weights of placed modules, those of one adapter or of several; safe to call from several threads."""

    def __init__(self, modules: Iterable[PlacedModule], reader: TensorReader) -> None:
        """``reader`` reads the adapters' tensors, and biases."""
        self._reader = reader
        self._layers = {method: TunerLayers(reader, sites) for method, sites in _sites(modules).items()}

    def merged(self, placed: PlacedModule, base: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The weight (out, in) and the bias that PEFT merges to, float32; the bias is None where there is none.

        Args:
            placed: a module of another method than LoRA.
            base: its weight (out, in), float32; it may be overwritten.

        Raises:
            AdapterError: the adapter's tensors do not make a layer of PEFT's, or hold NaN or infinity.
        """
        method = placed.module.method
        assert method is not None  # others have factors
        site = _site(placed)
        stored = base.T.contiguous() if _is_turned(site.kind) else base.view(site.shape)
        bias = None if placed.bias is None else self._reader.read(placed.bias).float()
        weight, bias = self._layers[method].merged(site.path, stored, bias)
        return (weight.T if _is_turned(site.kind) else weight.flatten(1)).contiguous(), bias

    def read_and_merge(self, placed: PlacedModule) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The same of a module whose base is read for it."""
        return self.merged(placed, read_weight(placed.weight, self._reader, torch.empty(placed.weight.numel)))


def check_tuned(modules: Sequence[PlacedModule]) -> None:
    """Hold the tensors' names and shapes against those of PEFT's layers on these weights.

    Raises:
        AdapterError: one that is missing, misshapen, or none of the method's.
    """
    with TensorReader() as reader:
        for sites in _sites(modules).values():
            TunerLayers(reader, sites).check()


def _sites(modules: Iterable[PlacedModule]) -> dict[TunerMethod, list[Site]]:
    found: dict[TunerMethod, list[Site]] = defaultdict(list)
    for placed in modules:
        if placed.module.method is not None:
            found[placed.module.method].append(_site(placed))
    return found


def _site(placed: PlacedModule) -> Site:
    out, inputs = placed.weight.shape
    kind: LayerKind = "linear"
    shape: tuple[int, ...] = (out, inputs)
    kernel = placed.module.lora_A.shape[2:]
    if placed.module.embedding:
        kind, shape = "embedding", (inputs, out)
    elif kernel:
        kind, shape = "conv", (out, placed.module.lora_A.shape[1], *kernel)
    elif placed.weight.pieces[0].transposed:
        kind, shape = "transposed", (inputs, out)
    ref = placed.weight.pieces[0].tensor
    return Site(placed.module, kind, shape, placed.bias is not None, (str(ref.file), ref.start))


def _is_turned(kind: LayerKind) -> bool:
    """Whether the layer holds its weight as (in, out)."""
    return kind in ("transposed", "embedding")
