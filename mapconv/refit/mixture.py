"""The layers' inputs at the source and behind rebased layers, side by side: two models in lockstep, layer by layer.

The source runs on the base that it was trained on, the result on the base that it is served on. Before each layer both
wait with every batch; the layer of the result is fitted to what it was really given, and runs with that fit from then
on. Every batch runs once through each model, whatever the number of layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from mapconv.algebra.moments import InputMoment
from mapconv.algebra.regression import PairedMoment, RegressionInputs
from mapconv.errors import CheckpointError
from mapconv.runtime.lockstep import Seen, paused_at
from mapconv.runtime.models import forward_pass
from mapconv.runtime.widening import WideBlocks, blocks_of


class Run(Protocol):
    """Models that wait before each layer."""

    def run(self, batches: Sequence[torch.Tensor]) -> Iterator[Waiting]:
        """Yield each layer in the order in which it runs; ``fit`` is to be called before the next is asked for."""
        ...

    def fit(self, path: str, weight: torch.Tensor) -> None:
        """Take note of a layer's fitted weight (out, in)."""
        ...


@dataclass(frozen=True)
class Waiting:
    """A layer that both models wait before: its path, and what is known of its inputs (None: nothing that fits)."""

    path: str
    inputs: RegressionInputs | None


class Mixture:
    """The source's model and the served model, which runs with every layer that was fitted so far."""

    def __init__(self, source: torch.nn.Module, served: torch.nn.Module, paths: Sequence[str]) -> None:
        """
        Args:
            source: the base with the source adapter, as it was trained.
            served: the other base; the adapter's whole tensors are in it already.
            paths: the layers to be fitted, by their path in both models; those that either lacks are left out.
        """
        self._source, self._served = source, served
        layers, others = dict(source.named_modules()), dict(served.named_modules())
        self._layers = {path: layers[path] for path in paths if path in layers and path in others}
        self._others = {path: others[path] for path in self._layers}
        WideBlocks(source, blocks_of(self._layers), _adapted(self._layers))
        WideBlocks(served, blocks_of(self._layers))

    def run(self, batches: Sequence[torch.Tensor]) -> Iterator[Waiting]:
        """Yield each layer in the order in which it runs; ``fit`` is to be called before the next is asked for.

        Args:
            batches: token ids, (sequences, length) each.

        Raises:
            CheckpointError: inputs that overflow, by the layer's name.
        """
        known: tuple[tuple[int, ...], RegressionInputs | None] = ((), None)
        left = set(self._layers)
        narrow = {path for path, layer in self._layers.items() if _is_narrow(layer)}
        wanted = paused_at(self._layers, [forward_pass(self._source, batch) for batch in batches], narrow)
        made = paused_at(self._others, [forward_pass(self._served, batch) for batch in batches])
        with closing(wanted), closing(made):
            for (path, x), (other, x_made) in zip(wanted, made, strict=False):
                if path != other:
                    return  # they take different ways (routed experts): what is left has no inputs to be compared by
                # Layers with one input (q, k and v) are given the same tensor.
                place = tuple(id(seen.input) for seen in (*x.values(), *x_made.values()))
                if place == known[0]:
                    inputs = known[1]
                else:
                    inputs = _paired(path, x, x_made, outputs=path in narrow)
                    # What outputs tell is of this layer alone.
                    known = (() if path in narrow else place, inputs)
                yield Waiting(path, inputs)
                left.discard(path)
                if not left:
                    return  # what comes behind the last layer, such as a head, need not run

    def fit(self, path: str, weight: torch.Tensor) -> None:
        """Give a layer of the served model its fitted weight (out, in); what stands on it otherwise is switched off."""
        layer: Any = self._others[path]
        if hasattr(layer, "base_layer"):
            layer.enable_adapters(False)
            layer = layer.base_layer
        values = weight.T if type(layer).__name__ == "Conv1D" else weight
        layer.weight.data = values.to(layer.weight.device).reshape(layer.weight.shape).contiguous()


class SourceInputs:
    """The source's model alone: each layer's inputs are taken to be those of the source, whatever lies before it."""

    def __init__(self, source: torch.nn.Module, paths: Sequence[str]) -> None:
        layers = dict(source.named_modules())
        self._source, self._layers = source, {path: layers[path] for path in paths if path in layers}
        self._blocks = WideBlocks(source, blocks_of(self._layers), _adapted(self._layers))

    def run(self, batches: Sequence[torch.Tensor]) -> Iterator[Waiting]:
        """As ``Mixture.run``."""
        known: tuple[tuple[int, ...], RegressionInputs | None] = ((), None)
        left = set(self._layers)
        with closing(paused_at(self._layers, [forward_pass(self._source, batch) for batch in batches])) as steps:
            for path, x in steps:
                place = tuple(id(seen.input) for seen in x.values())
                if place != known[0]:
                    known = (place, _alone(path, [seen.input for seen in x.values()]))
                yield Waiting(path, known[1])
                left.discard(path)
                if not left:
                    return

    def fit(self, path: str, weight: torch.Tensor) -> None:
        """Nothing: the source stays as it is."""

    def close(self) -> None:
        """Leave the source as it was, for another run."""
        self._blocks.close()


def _adapted(layers: Mapping[str, Any]) -> dict[str, Any]:
    """Those that stock PEFT attached an adapter to."""
    return {path: layer for path, layer in layers.items() if hasattr(layer, "base_layer")}


def _is_narrow(layer: Any) -> bool:
    """Whether what a layer makes of its inputs, as it is or with an adapter, is less than them, and known by itself."""
    linear = getattr(layer, "base_layer", layer)
    if not isinstance(linear, torch.nn.Linear) or linear.bias is not None:
        return False
    return linear.out_features < linear.in_features


def _paired(path: str, x: dict[int, Seen], x_made: dict[int, Seen], *, outputs: bool) -> RegressionInputs | None:
    """Both moments over every batch; None where the inputs are not vectors, or differ in shape.

    With ``outputs``, the layer's at the source stand for its inputs there: what they tell of its weight is the same.
    """
    tensors = [seen.input for seen in (*x.values(), *x_made.values())]
    if not all(tensor.is_floating_point() and tensor.ndim >= 2 for tensor in tensors):
        return None
    if x.keys() != x_made.keys() or any(x[number].input.shape != x_made[number].input.shape for number in x):
        return None
    moment = PairedMoment(tensors[0].shape[-1], of_outputs=outputs)
    for number, (wanted, output) in x.items():
        moment.add(wanted if output is None else output, x_made[number].input)
    if not moment.finite:
        raise CheckpointError(f"the inputs of {path} overflow: one of the bases or the adapter has diverged.")
    return moment.inputs()


def _alone(path: str, x: Sequence[torch.Tensor]) -> RegressionInputs | None:
    """The second moment of the inputs of every batch; None where they are not vectors."""
    if not all(tensor.is_floating_point() and tensor.ndim >= 2 for tensor in x):
        return None
    moment = InputMoment(x[0].shape[-1], "full")
    for tensor in x:
        moment.add(tensor.float())
    if not moment.finite:
        raise CheckpointError(f"the inputs of {path} overflow: the base or the adapter has diverged.")
    root = moment.root()
    return None if root is None else RegressionInputs(root, None, moment.count)
