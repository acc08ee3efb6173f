"""The layers' inputs at the source and behind rebased layers, side by side: two models in lockstep, layer by layer.

The source runs on the base that it was trained on, the result on the base that it is served on. Before each layer both
wait with every batch; the layer of the result is fitted to what it was really given, and runs with that fit from then
on. Every batch runs once through each model, whatever the number of layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from mapconv.algebra.moments import InputMoment
from mapconv.algebra.regression import PairedMoment, RegressionInputs
from mapconv.errors import CheckpointError
from mapconv.runtime.lockstep import paused_before
from mapconv.runtime.models import model_inputs
from mapconv.runtime.widening import WideBlocks


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
        for model in (source, served):
            WideBlocks(model, dict.fromkeys(name for path in self._layers if (name := block_of(path)) is not None))

    def run(self, batches: Sequence[torch.Tensor]) -> Iterator[Waiting]:
        """Yield each layer in the order in which it runs; ``fit`` is to be called before the next is asked for.

        Args:
            batches: token ids, (sequences, length) each.

        Raises:
            CheckpointError: inputs that overflow, by the layer's name.
        """
        known: tuple[tuple[int, ...], RegressionInputs | None] = ((), None)
        wanted = paused_before(self._layers, [_forward(self._source, batch) for batch in batches])
        made = paused_before(self._others, [_forward(self._served, batch) for batch in batches])
        with closing(wanted), closing(made):
            for (path, x), (other, x_made) in zip(wanted, made, strict=False):
                if path != other:
                    return  # they take different ways (routed experts): what is left has no inputs to be compared by
                # Layers with one input (q, k and v) are given the same tensor.
                place = tuple(id(tensor) for tensor in (*x.values(), *x_made.values()))
                if place != known[0]:
                    known = (place, _paired(path, x, x_made))
                yield Waiting(path, known[1])

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
        blocks = dict.fromkeys(name for path in self._layers if (name := block_of(path)) is not None)
        self._blocks = WideBlocks(source, blocks)

    def run(self, batches: Sequence[torch.Tensor]) -> Iterator[Waiting]:
        """As ``Mixture.run``."""
        known: tuple[tuple[int, ...], RegressionInputs | None] = ((), None)
        with closing(paused_before(self._layers, [_forward(self._source, batch) for batch in batches])) as steps:
            for path, x in steps:
                place = tuple(id(tensor) for tensor in x.values())
                if place != known[0]:
                    known = (place, _alone(path, x))
                yield Waiting(path, known[1])

    def fit(self, path: str, weight: torch.Tensor) -> None:
        """Nothing: the source stays as it is."""

    def close(self) -> None:
        """Leave the source as it was, for another run."""
        self._blocks.close()


def block_of(path: str) -> str | None:
    """The numbered part of the model that a path lies in, ``model.layers.0``; None for one in none."""
    parts = path.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdecimal()), None)
    return None if number is None else ".".join(parts[: number + 1])


def _paired(path: str, x: dict[int, torch.Tensor], x_made: dict[int, torch.Tensor]) -> RegressionInputs | None:
    """Both moments over every batch; None where the inputs are not vectors, or differ in shape."""
    tensors = [*x.values(), *x_made.values()]
    if not all(tensor.is_floating_point() and tensor.ndim >= 2 for tensor in tensors):
        return None
    if x.keys() != x_made.keys() or any(x[number].shape != x_made[number].shape for number in x):
        return None
    moment = PairedMoment(tensors[0].shape[-1])
    for number, wanted in x.items():
        moment.add(wanted, x_made[number])
    if not moment.finite:
        raise CheckpointError(f"the inputs of {path} overflow: one of the bases or the adapter has diverged.")
    return moment.inputs()


def _alone(path: str, x: dict[int, torch.Tensor]) -> RegressionInputs | None:
    """The second moment of the inputs of every batch; None where they are not vectors."""
    if not all(tensor.is_floating_point() and tensor.ndim >= 2 for tensor in x.values()):
        return None
    moment = InputMoment(next(iter(x.values())).shape[-1], "full")
    for tensor in x.values():
        moment.add(tensor.float())
    if not moment.finite:
        raise CheckpointError(f"the inputs of {path} overflow: the base or the adapter has diverged.")
    root = moment.root()
    return None if root is None else RegressionInputs(root, None, moment.count)


def _forward(model: Any, tokens: torch.Tensor) -> Callable[[], Any]:
    return lambda: model(**model_inputs(model, tokens))
