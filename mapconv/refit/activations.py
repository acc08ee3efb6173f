"""What the layers of the adapted model are fed with: second moments of their inputs, block by block of the model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from mapconv.adapter import Module
from mapconv.algebra.moments import InputMoment, InputRoot, Statistics
from mapconv.data import Dataset
from mapconv.data.blocks import BATCH, batches_of
from mapconv.errors import CheckpointError, DataError, UnsupportedError
from mapconv.placement.adapters import PlacedAdapter
from mapconv.placement.running import load_base
from mapconv.placement.weights import PlacedModule
from mapconv.runtime.lockstep import in_lockstep
from mapconv.runtime.models import attach_with_peft, forward_pass, longest_text, reads_text
from mapconv.runtime.widening import block_of, forget_merge


def input_roots(
    placed: PlacedAdapter, data: Dataset, *, statistics: Statistics, device: torch.device, quiet: bool = True
) -> Iterator[tuple[list[PlacedModule], Mapping[str, InputRoot | None]]]:
    """Yield the modules of each block of the model with the roots of their inputs' second moments, by module path.

    The model is the base with the source adapter, whose layers' inputs are the ones that the result will see. It runs
    on the sequences of ``data`` in float32, one block of it at a time in that precision, and only that block's
    statistics are in memory. Layers with the same input share one moment. A path is absent, or its root None, where
    nothing was seen: a layer that no input reached, or whose inputs are not vectors (stacked experts, convolutions).

    Raises:
        CheckpointError: the model or the adapter cannot be loaded, or overflows on these inputs.
        DataError: the sequences are longer than the model's positions allow.
        UnsupportedError: the model needs more than text.
    """
    yield from roots_of(
        _source_model(placed, device, quiet=quiet), placed.target.folder, placed.modules, data, statistics, device
    )


def roots_of(
    model: torch.nn.Module,
    folder: Path,
    modules: Sequence[PlacedModule],
    data: Dataset,
    statistics: Statistics,
    device: torch.device,
) -> Iterator[tuple[list[PlacedModule], Mapping[str, InputRoot | None]]]:
    """As ``input_roots``, of the layers of a model that is loaded already; ``folder`` is what errors call it."""
    groups = _by_block(modules)
    rest = groups.pop(None, [])
    if not reads_text(model):
        raise UnsupportedError(f"{folder} needs more than text as its input: convert it without --data.")
    length = max(len(row) for row in data.rows())
    if length > longest_text(model):
        raise DataError(
            f"{folder} takes {longest_text(model)} tokens at most, and the data's sequences have up to "
            f"{length}: choose a smaller --sequence-length."
        )
    observer = _Observer(model, modules, statistics, units=[name for name in groups if name is not None])
    # With an adapted head, one at a time: the logits of a batch are the largest tensor by far.
    batches = batches_of(data.rows(), 1 if rest else BATCH)
    passes = [forward_pass(model, torch.tensor(batch, device=device)) for batch in batches]
    waiting = dict(groups)
    # Closed at once when the last wanted block is done: what comes behind it need not run.
    with closing(in_lockstep(observer.units, passes, observer.enter)) as steps:
        for name in steps:
            if name is not None:
                yield waiting.pop(name), observer.leave(name)
            if not waiting and not rest:
                break
    for name in [*waiting, *([None] if rest else [])]:
        yield waiting.pop(name, rest), observer.leave(name)


class _Observer:
    """Hooks on the adapted layers that count their inputs; while a block runs, its weights are merged, in float32."""

    def __init__(
        self, model: torch.nn.Module, modules: Sequence[PlacedModule], statistics: Statistics, units: Sequence[str]
    ) -> None:
        self.units = {name: model.get_submodule(name) for name in units}
        self._statistics: Statistics = statistics
        #: By block, then by module path: what lies in no block may run long before its turn comes.
        self._moments: dict[str | None, dict[str, InputMoment]] = defaultdict(dict)
        self._seen: list[tuple[torch.Tensor, InputMoment]] = []
        self._stored: dict[str, list[tuple[torch.nn.Parameter, torch.Tensor]]] = {}
        #: Linear layers that PEFT has adapted, by block.
        self._linears: dict[str | None, list[Any]] = defaultdict(list)
        layers = dict(model.named_modules())
        for module in {item.module.path: item.module for item in modules if item.experts == 1}.values():
            if len(module.lora_A.shape) == 2 and module.path in layers:
                layer = layers[module.path]
                layer.register_forward_pre_hook(self._hook(module), with_kwargs=True)
                if hasattr(layer, "merge") and not module.embedding and module.bias is None:
                    self._linears[block_of(module.path)].append(layer)
        inside = {id(parameter) for unit in self.units.values() for parameter in unit.parameters()}
        for parameter in model.parameters():
            if id(parameter) not in inside:
                parameter.data = parameter.data.float()

    def enter(self, name: str) -> None:
        """Before a block runs: nothing of another pass is shared with this one, and it computes in float32."""
        self._seen.clear()
        if name not in self._stored:
            parameters = list(self.units[name].parameters())
            self._stored[name] = [(parameter, parameter.data) for parameter in parameters]
            # What is stored in float32 stays what it is where a merge is about to change it.
            for parameter in parameters:
                parameter.data = parameter.data.to(torch.float32, copy=bool(self._linears[name]))
            for layer in self._linears[name]:
                # Unmerged, PEFT forms a DoRA's whole weight and its row norms anew for every batch.
                layer.merge()

    def leave(self, name: str | None) -> dict[str, InputRoot | None]:
        """The roots of a block (None: of all that is in no block); its statistics and float32 weights are dropped."""
        if name in self._stored:
            for parameter, values in self._stored.pop(name):
                parameter.data = values
            for layer in self._linears[name]:
                forget_merge(layer)
        self._seen.clear()
        shared: dict[int, InputRoot | None] = {}
        roots = {}
        for path, moment in self._moments.pop(name, {}).items():
            if not moment.finite:
                raise CheckpointError(f"the inputs of {path} overflow: the base or the adapter has diverged.")
            if id(moment) not in shared:
                shared[id(moment)] = moment.root()
            roots[path] = shared[id(moment)]
        return roots

    def _hook(self, module: Module) -> Callable[..., None]:
        block = block_of(module.path)

        def count(layer: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            inputs = arguments[0] if arguments else next(iter(named.values()))
            known = next((moment for tensor, moment in self._seen if tensor is inputs), None)
            moment = self._moments[block].get(module.path)
            if moment is None:
                moment = self._moments[block][module.path] = known or self._new_moment(module)
            if moment is known:
                return  # its neighbours have the same input, which is counted once
            if module.embedding:
                moment.add_indices(inputs)
            else:
                moment.add(inputs.float())
            self._seen.append((inputs, moment))

        return count

    def _new_moment(self, module: Module) -> InputMoment:
        # The inputs of an embedding are one-hot, so that their second moment is diagonal.
        statistics: Statistics = "diagonal" if module.embedding else self._statistics
        return InputMoment(module.weight_shape[1], statistics)


def _by_block(modules: Sequence[PlacedModule]) -> dict[str | None, list[PlacedModule]]:
    """Modules by the block that they lie in, ``model.layers.0``; None for those in no numbered one."""
    groups: dict[str | None, list[PlacedModule]] = defaultdict(list)
    for item in modules:
        groups[block_of(item.module.path)].append(item)
    return dict(groups)


def _source_model(placed: PlacedAdapter, device: torch.device, *, quiet: bool) -> torch.nn.Module:
    """The base with the source adapter, as stock PEFT attaches it, in the base's own dtype."""
    base = load_base(placed, device=device, quiet=quiet)
    return attach_with_peft(base, placed.adapter.path, "source").get_base_model()
